"""GET /: the page needs no key, loads nothing, and in a real browser it streams what the engine generates."""

import json
import re

import httpx
import pytest

pytest.importorskip("fastapi")

from helpers.browser import CONTROL, Browser, browser
from helpers.eager_bundle import eager_llm
from helpers.serving import LIMITS, async_llm, server

KEY = "sk-secret"
PROMPT, TOKENS = "<b>abc</b>", 20
ALL_NUMBERS = {"max_tokens": TOKENS, "temperature": 0, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3}
TEXT = "document.querySelector('#log > span:last-child').textContent"
TOKENS_SHOWN = "/tokens \\(/.test(document.getElementById('note').textContent)"


@pytest.fixture(scope="module")
def llm():
    return async_llm()


@pytest.fixture(scope="module")
def address(llm):
    with server(llm, api_key=KEY) as address:
        yield address


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


def test_the_page_is_served_without_a_key_and_loads_nothing(address) -> None:
    answer = httpx.get(f"{address}/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'" and policy["connect-src"] == "'self'"
    assert all("unsafe" not in value and "*" not in value for value in policy.values())
    assert KEY not in answer.text
    assert not re.search(r"https?:|//[a-z]|\bsrc=|innerHTML|\son[a-z]+=|\sstyle=", re.sub(r"\s//\s.*", "", answer.text))
    assert httpx.get(f"{address}/v1/models").status_code == 401


def focus(chromium: Browser, element: str) -> None:
    chromium.evaluate(f"document.getElementById('{element}').focus()")


def test_a_key_then_a_completion_and_a_chat_by_keyboard(chromium, address, llm) -> None:
    reference = eager_llm(LIMITS)
    chromium.open(address)
    chromium.wait("document.getElementById('key-dialog').open && document.activeElement.id === 'key'")
    for key, refused in (("sk-wrong", True), (KEY, False)):
        chromium.evaluate("document.getElementById('key').select()")
        chromium.type(key)
        chromium.press("Enter")
        said = "document.getElementById('key-note').textContent.includes('refused')"
        chromium.wait(said if refused else "!document.getElementById('key-dialog').open")
    chromium.wait("document.getElementById('model').value === 'mini'")
    assert chromium.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]") == [[KEY], 0, ""]

    for name, value in ALL_NUMBERS.items():
        chromium.evaluate(f"document.querySelector('[name={name}]').value = '{value}'")
    focus(chromium, "prompt")
    chromium.type(PROMPT)
    chromium.press("Enter", CONTROL)
    chromium.wait(TOKENS_SHOWN)
    assert chromium.evaluate(TEXT) == reference.generate(PROMPT, TOKENS)[0].text
    sent = json.loads(chromium.evaluate("document.getElementById('request').textContent").split("\n", 1)[1])
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    assert sent == {"model": "mini", "prompt": PROMPT, **ALL_NUMBERS, **streamed}

    chromium.evaluate("document.querySelector('[value=chat]').click()")
    asked = ""
    for turn in ("hi", "more"):
        focus(chromium, "prompt")
        chromium.type(turn)
        chromium.evaluate("document.getElementById('note').textContent = ''")
        chromium.press("Enter", CONTROL)
        chromium.wait(TOKENS_SHOWN)
        asked += f"<user>{turn}\n"
        said = chromium.evaluate("document.querySelector('#log article:last-child div').textContent")
        assert said == reference.generate(f"{asked}<assistant>", TOKENS)[0].text
        asked += f"<assistant>{said}\n"
    assert chromium.console == ["Failed to load resource: the server responded with a status of 401 (Unauthorized)"] * 2


def test_the_engine_is_shown(chromium, address, llm) -> None:
    chromium.wait("document.getElementById('slots').textContent === '0 of 4'")
    chromium.wait("/\\d m?s$/.test(document.getElementById('ttft').textContent)")
    pages = llm.batching.scheduler.pages.size
    assert chromium.evaluate("document.getElementById('pages').textContent") == f"0 of {pages}"
    assert chromium.evaluate("document.getElementById('pages-meter').max") == pages


def test_escape_stops_a_stream_and_a_refusal_is_shown(chromium, address, llm) -> None:
    cancelled = llm.batching.metrics.requests["cancelled"]
    chromium.evaluate("document.querySelector('[value=completion]').click()")
    chromium.evaluate("document.querySelector('[name=max_tokens]').value = '380'")
    focus(chromium, "prompt")
    chromium.type("abc")
    chromium.press("Enter", CONTROL)
    chromium.wait(f"document.querySelector('#log > span:last-child') && {TEXT}.length > 0")
    chromium.press("Escape")
    chromium.wait("document.getElementById('note').textContent === 'Stopped.'")
    chromium.wait("!document.getElementById('send').disabled")
    chromium.evaluate("document.querySelector('[name=max_tokens]').value = '4000'")
    chromium.press("Enter", CONTROL)
    chromium.wait("document.getElementById('note').textContent.includes('max_seq_len 400')")
    assert llm.batching.metrics.requests["cancelled"] == cancelled + 1
