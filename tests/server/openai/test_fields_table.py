"""docs/serving/openai-fields.md lists the fields that are accepted, and those that are refused."""

import json
import re

import pytest

pytest.importorskip("fastapi")

from helpers.paths import ROOT

from jet_export.server.openai.protocol import DONE_ANYWAY, ApiError, ChatBody, CompletionBody, parse

TEXT = (ROOT / "docs/serving/openai-fields.md").read_text(encoding="utf-8")
ACCEPTED, REFUSED = TEXT.split("## Refused")
NEEDED: dict[type, dict] = {CompletionBody: {"prompt": "p"}, ChatBody: {"messages": [{"role": "user", "content": "c"}]}}
IN = {"both": (CompletionBody, ChatBody), "completions": (CompletionBody,), "chat": (ChatBody,)}


def test_the_rows_are_the_fields_of_the_bodies() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", ACCEPTED, re.MULTILINE)
    assert len(rows) == len(dict(rows))
    for body in (CompletionBody, ChatBody):
        assert {field for field, where in rows if body in IN[where]} == body.model_fields.keys()


@pytest.mark.parametrize("body", [CompletionBody, ChatBody])
def test_what_is_said_to_be_refused_is(body) -> None:
    fields = [f for row in re.findall(r"^\| (`.*?) \|", REFUSED, re.MULTILINE) for f in re.findall(r"`(\w+)`", row)]
    assert len(fields) > 30
    for field in fields:
        with pytest.raises(ApiError, match=f"{field} is not supported"):
            parse(body, json.dumps({"model": "m", **NEEDED[body], field: 1}).encode())


@pytest.mark.parametrize("body", [CompletionBody, ChatBody])
def test_what_is_done_anyway_may_be_asked_for(body) -> None:
    """sglang-router sends these with every request."""
    needed = {"model": "m", **NEEDED[body]}
    assert parse(body, json.dumps({**needed, **DONE_ANYWAY}).encode()) == parse(body, json.dumps(needed).encode())
    for field, value in DONE_ANYWAY.items():
        with pytest.raises(ApiError, match=f"{field} is not supported"):
            parse(body, json.dumps({**needed, field: not value}).encode())
