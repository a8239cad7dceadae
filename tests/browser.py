"""A headless Chromium, spoken to over its DevTools' pipe, and what it says of a page at a window's size."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


def chromium() -> str:
    """The browser; the test is skipped where there is none, and fails where `.ci/run` runs it."""
    found = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    if found is None:
        said = "needs a browser: apt-get install chromium"
        pytest.fail(said) if os.environ.get("NVIT_CI") else pytest.skip(said)
    return found


@dataclass
class Tab:
    """One page of a browser.

    Attributes:
        events: what it said unasked, as `(method, parameters)`.
    """

    write: int
    read: int
    session: str = ""
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    count: int = 0
    rest: bytes = b""

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            if not (more := os.read(self.read, 2**16)):
                raise EOFError("the browser is gone")
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\0")
        return json.loads(line)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        said = {"id": self.count, "method": method, "params": parameters}
        os.write(self.write, json.dumps(said | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while (found := self._message()).get("id") != self.count:
            self.events.append((found.get("method", ""), found.get("params", {})))
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']}")
        return found["result"]

    def value(self, script: str) -> Any:
        """What a line of JavaScript gives, which runs beside the page's own (it has none)."""
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def open(self, page: Path, width: int, *, dark: bool = False, media: str = "") -> None:
        """Load a page in a window of this width; `media` is print, or the screen."""
        self.events.clear()
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            found = self._message()
            self.events.append((found.get("method", ""), found.get("params", {})))

    def said(self, *methods: str) -> list[dict[str, Any]]:
        return [parameters for method, parameters in self.events if method in methods]

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def tab(profile: Path) -> Iterator[Tab]:
    """A new tab of a new browser with an empty profile."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()

    def pipes() -> None:
        # The two may be 3 and 4 themselves, so they go out of the way first.
        low, high = os.dup2(theirs_in, 103), os.dup2(theirs_out, 104)
        os.dup2(low, 3), os.dup2(high, 4)

    command = [chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(command, close_fds=False, preexec_fn=pipes, stderr=subprocess.DEVNULL)
    try:
        os.close(theirs_in), os.close(theirs_out)
        found = Tab(ours_out, ours_in)
        target = found.ask("Target.createTarget", url="about:blank")["targetId"]
        found.session = found.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            found.ask(f"{domain}.enable")
        yield found
    finally:
        os.close(ours_out), os.close(ours_in)
        with contextlib.suppress(subprocess.TimeoutExpired):
            browser.wait(5)
        browser.kill()
        browser.wait()
