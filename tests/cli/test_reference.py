"""docs/cli.md is what the commands say of themselves."""

from helpers.paths import ROOT

from jet_export.cli.app import app
from jet_export.cli.reference import reference

PAGE = ROOT / "docs/cli.md"


def test_the_page_is_up_to_date() -> None:
    told = "out of date: python -m jet_export.cli.reference > docs/cli.md"
    assert PAGE.read_text(encoding="utf-8") == reference(app), told


def test_every_command_and_every_option_is_there() -> None:
    text = reference(app)
    for command in app.registered_commands:
        name = command.name or str(getattr(command.callback, "__name__", "")).replace("_", "-")
        assert f"## jet-export {name}\n" in text
    assert "| `--model` |" in text and "| `BUNDLE` |" in text
