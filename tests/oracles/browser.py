"""Headless Chromium over the WebDriver wire protocol (W3C), as much of it as the page's test needs.

Debian's packages: chromium and chromium-driver.
"""

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1100,900"]
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
LEFT, UP, RIGHT, DOWN = "\ue012", "\ue013", "\ue014", "\ue015"


def missing() -> str:
    """Why there is no browser, or ""."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(absent)}; on Debian: apt-get install chromium chromium-driver" if absent else ""


class Browser:
    def __init__(self):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        try:
            port = next(m[1] for m in map(re.compile(r"successfully on port (\d+)").search, self.driver.stdout) if m)
            self.url = f"http://127.0.0.1:{port}/session"
            session = self.call("", capabilities={"alwaysMatch": {
                "goog:chromeOptions": {"args": ARGUMENTS}, "goog:loggingPrefs": {"browser": "ALL"}}})
            self.url += "/" + session["sessionId"]
        except BaseException:
            self.driver.kill()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.call("", "DELETE")
        finally:
            self.driver.terminate()
            self.driver.wait(10)
            self.driver.stdout.close()

    def call(self, path: str, method: str = "POST", **body):
        """One command; its value. The driver's own errors come as HTTPError with the reason in the body."""
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with DIRECT.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, file: Path) -> None:
        self.call("/url", url=file.resolve().as_uri())

    def js(self, code: str, *args):
        """`return ...` in the page."""
        return self.call("/execute/sync", script=code, args=list(args))

    def click(self, css: str, dx: int = 0, dy: int = 0) -> None:
        """Pixels off the middle of an element."""
        origin = self.call("/element", using="css selector", value=css)
        self.js("arguments[0].scrollIntoView({block: 'center'})", origin)
        self.call("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": [
            {"type": "pointerMove", "origin": origin, "x": dx, "y": dy},
            {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]}])

    def keys(self, css: str, keys: str) -> None:
        element = next(iter(self.call("/element", using="css selector", value=css).values()))
        self.call(f"/element/{element}/value", text=keys)

    def cdp(self, command: str, **params):
        return self.call("/goog/cdp/execute", cmd=command, params=params)

    def errors(self) -> list[str]:
        """What the console has been told since the last call: failed loads, exceptions, console.error."""
        return [entry["message"] for entry in self.call("/se/log", type="browser") if entry["level"] == "SEVERE"]

    def screenshot(self, file: Path) -> None:
        """The whole page, however long."""
        file.write_bytes(base64.b64decode(self.cdp("Page.captureScreenshot", captureBeyondViewport=True)["data"]))
