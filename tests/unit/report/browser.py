"""A headless Chromium, driven over its DevTools pipe (https://chromedevtools.github.io/devtools-protocol/)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from base64 import b64decode
from pathlib import Path
from select import select
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 120  # seconds
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. Ends with `close`."""

    def __init__(self, folder: Path) -> None:
        read_commands, self._commands = os.pipe()
        self._answers, write_answers = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        start = f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}'  # the pipe has these two numbers
        self._process = subprocess.Popen(
            ["bash", "-c", start, str(PROGRAM), *flags, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self._number, self._rest, self._session, self._script = 0, b"", None, True
        self._loaded = False
        self.failures: list[str] = []
        tabs = self.send("Target.getTargets")["targetInfos"]
        target = next(tab["targetId"] for tab in tabs if tab["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """The result of a command. What the page logs meanwhile, errors too, goes into ``failures``."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while (message := self._receive()).get("id") != self._number:
            self._note(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def _note(self, event: dict[str, Any]) -> None:
        if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.failures.append(json.dumps(event["params"]))
        self._loaded |= event["method"] == "Page.loadEventFired"

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select([self._answers], [], [], PATIENCE)[0]:
                raise RuntimeError("the browser does not answer")
            found = os.read(self._answers, 1 << 16)
            if not found:
                raise RuntimeError("the browser has ended")
            self._rest += found
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, file: Path, width: int = 1200, dark: bool = False, script: bool = True) -> None:
        """Show a file in a window of this width; ``script`` lets it run its own."""
        self.failures.clear()
        self._script = script
        colours = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=colours)
        self.send("Emulation.setScriptExecutionDisabled", value=not script)
        self.resize(width, 900)
        self.visit(file.as_uri())

    def visit(self, address: str) -> None:
        """Show an address, and return when it is loaded."""
        self._loaded = False
        self.send("Page.navigate", url=address)
        while not self._loaded:
            self._note(self._receive())

    def resize(self, width: int, height: int) -> None:
        """Make the window as large, in CSS pixels; narrow ones are phones."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def run(self, expression: str) -> Any:
        """The value of an expression in the page, after it was drawn. Pages without script draw at once, and
        have no animation frames."""
        frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        drawn = frames if self._script else "Promise.resolve()"
        answer = self.send(
            "Runtime.evaluate",
            expression=f"{drawn}.then(() => ({expression}))",
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press and release a key on what has the focus."""
        pressed: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        written = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **pressed, **written)
        self.send("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def screenshot(self) -> bytes:
        """What the window shows, as PNG."""
        return b64decode(self.send("Page.captureScreenshot")["data"])

    def close(self) -> None:
        """End the browser."""
        os.close(self._commands)
        os.close(self._answers)
        self._process.terminate()
        self._process.wait(timeout=60)
