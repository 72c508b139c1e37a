"""GET /: a page to try the model from, with a live view of the engine. It is one file and loads nothing from elsewhere.

The page is served without a key and holds no secret; what it calls asks for the key.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from fastapi.responses import HTMLResponse, Response


@cache
def page() -> str:
    return (files("jet_export") / "data" / "page" / "index.html").read_text(encoding="utf-8")


@cache
def content_security_policy() -> str:
    """Only the page's own script and style, named by their hashes, and calls to this server."""
    script, style = (_hash(re.findall(rf"<{tag}>(.*?)</{tag}>", page(), re.DOTALL)) for tag in ("script", "style"))
    rules = {
        "default-src": "'none'",
        "script-src": script,
        "style-src": style,
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash(blocks: list[str]) -> str:
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(b.encode()).digest()).decode()}'" for b in blocks)


async def serve_page() -> Response:
    headers = {
        "Content-Security-Policy": content_security_policy(),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Opener-Policy": "same-origin",
    }
    return HTMLResponse(page(), headers=headers)
