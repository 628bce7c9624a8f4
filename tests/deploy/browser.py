"""A headless Chromium, driven by chromedriver over plain HTTP (the protocol of W3C WebDriver)."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id, by the standard
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no other server is reached
)


def missing() -> str | None:
    """What is not installed; None if a browser can be started."""
    programs = {"chromium": "chromium", "chromedriver": "chromium-driver"}
    absent = [package for program, package in programs.items() if not shutil.which(program)]
    return f"needs {' and '.join(absent)} (packages of Debian)" if absent else None


class Browser:
    """One window.

    Args:
        url: Of the session.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def open(self, url: str) -> None:
        """Load a page."""
        _call("POST", f"{self.url}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that the body of a JavaScript function returns, or resolves to."""
        return _call("POST", f"{self.url}/execute/sync", {"script": script, "args": [*arguments]})

    def choose(self, selector: str, path: Path) -> None:
        """Choose a file in a file input."""
        found = _call("POST", f"{self.url}/element", {"using": "css selector", "value": selector})
        text = {"text": str(path), "value": [*str(path)]}
        _call("POST", f"{self.url}/element/{found[_ELEMENT]}/value", text)

    def wait(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression is true; its value.

        Raises:
            AssertionError: it is not, in time; the message has the text of the page.
        """
        end = time.monotonic() + seconds
        while not (value := self.run(f"return {script}")):
            text = self.run("return document.body.innerText")
            assert time.monotonic() < end, f"{script} is {value!r}; the page says: {text}"
            time.sleep(0.1)
        return value


def _call(method: str, url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from None


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert driver.stdout is not None
    try:
        line = next(line for line in driver.stdout if "successfully on port" in line)
        server = f"http://127.0.0.1:{line.split()[-1].rstrip('.')}/session"
        options = {
            "binary": shutil.which("chromium"),
            "args": [*_ARGUMENTS, f"--user-data-dir={profile}"],
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        session = _call("POST", server, {"capabilities": {"alwaysMatch": wanted}})
        url = f"{server}/{session['sessionId']}"
        try:
            yield Browser(url)
        finally:
            _call("DELETE", url)
    finally:
        driver.terminate()
        driver.wait(30)
        driver.stdout.close()


class _Handler(SimpleHTTPRequestHandler):
    def end_headers(self) -> None:
        self.send_header("Access-Control-Allow-Origin", "*")  # as a CDN does
        super().end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def served(directory: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """The address of a directory on a local web server, and a function that stops the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(directory)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()

    def stop() -> None:
        if thread.is_alive():
            server.shutdown()
            server.server_close()
            thread.join()

    try:
        yield f"http://127.0.0.1:{server.server_port}/", stop
    finally:
        stop()
