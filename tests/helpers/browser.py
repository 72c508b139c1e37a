"""Chromium without a window, driven over the DevTools protocol through a pipe."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CONTROL = 2  # the modifier's bit
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, " ": 32}
TEXT = {"Enter": "\r", " ": " "}


class Browser:
    """One page. `console`: what it logged, breaches of its Content-Security-Policy among it."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._id = to, back, b"", 0
        self._session: str | None = None
        self.console: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._id:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            if answer.get("method") == "Log.entryAdded":
                self.console.append(answer["params"]["entry"]["text"])
            elif answer.get("method") == "Runtime.exceptionThrown":
                self.console.append(str(answer["params"]["exceptionDetails"]))

    def _receive(self, seconds: float = 60) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._back], [], [], seconds)[0], "Chromium does not answer"
            part = os.read(self._back, 1 << 20)
            assert part, "Chromium has ended"
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, url: str, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """The value of the expression, once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, expression
            time.sleep(0.02)
        return value

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        code = {"key": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        text = {"text": TEXT[key]} if key in TEXT and not modifiers else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **code)

    def screenshot(self, file: Path, width: int = 1400, height: int = 900) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Skips the test where no Chromium is installed. `profile`: a directory of its own."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no Chromium is installed")
    to_read, to = os.pipe()
    back, back_write = os.pipe()
    # The browser reads from 3 and writes to 4; no sandbox: it loads this test's page only, and may run as root.
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
    shell = f'exec "$0" "$@" 3<&{to_read} 4>&{back_write}'
    command = ["/bin/bash", "-c", shell, program, *options, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, pass_fds=(to_read, back_write), stderr=subprocess.DEVNULL)
    os.close(to_read)
    os.close(back_write)
    try:
        yield Browser(to, back)
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(back)
