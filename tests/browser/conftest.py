"""Pages in a real headless Chromium; these tests skip where there is none."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)


class Browser:
    """A page in a window of 1400 x 1000, driven as a reader would."""

    def __init__(self, driver: Any, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads

    def open(self, page: Path) -> None:
        """Open a page and wait until it is loaded and its charts are drawn."""
        self.driver.get(page.resolve().as_uri())
        self.wait_until_loaded()

    def wait_until_loaded(self) -> None:
        """Wait until the page is loaded and, where scripts run, its charts are drawn."""
        self.wait("document.readyState === 'complete' && document.documentElement.dataset.charts !== 'pending'")

    def reload(self) -> None:
        """Load the page again, as `open` does."""
        self.driver.refresh()
        self.wait_until_loaded()

    def js(self, script: str, *arguments: Any) -> Any:
        """What `return ...` in the page gives."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, seconds: float = 10.0) -> Any:
        """The value of an expression in the page once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.js(f"return {script}")):
            assert time.monotonic() < deadline, f"still not so: {script}"
            time.sleep(0.02)
        return value

    def find(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def button(self, text: str) -> Any:
        return self.driver.find_element("xpath", f"//button[normalize-space()='{text}']")

    def press(self, *keys: str) -> None:
        """Keys for the element with the focus; names as in `selenium.webdriver.Keys`."""
        from selenium.webdriver import Keys

        self.driver.switch_to.active_element.send_keys("".join(getattr(Keys, key, key) for key in keys))

    def mouse(self, *steps: tuple[float, float] | str) -> None:
        """Move to places of the window; `down` and `up` are the left button."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder

        actions = ActionBuilder(self.driver, duration=5)
        for step in steps:
            if isinstance(step, str):
                getattr(actions.pointer_action, f"pointer_{step}")()
            else:
                actions.pointer_action.move_to_location(round(step[0]), round(step[1]))
        actions.perform()

    def data(self, page: Path, section: str) -> Any:
        """The data of a page's section, read from the file."""
        text = page.read_text(encoding="utf-8")
        return json.loads(re.search(rf'id="data-{section}">(.*?)</script>', text, re.DOTALL).group(1))

    def downloaded(self, name: str) -> bytes:
        deadline = time.monotonic() + 10
        while not (file := self.downloads / name).is_file():
            assert time.monotonic() < deadline, f"{name} was not downloaded"
            time.sleep(0.02)
        return file.read_bytes()

    def messages(self) -> list[str]:
        """What the page has put into the console since the last call: errors and warnings."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def _program(*names: str) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="session")
def _driver(tmp_path_factory):
    chromium, chromedriver = _program("chromium", "chromium-browser", "google-chrome"), _program("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    downloads = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*CHROMIUM_FLAGS, "--window-size=1400,1000", f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # the driver is on this machine: a proxy could only refuse it
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "localhost", "127.0.0.1"]))
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver, downloads
    driver.quit()


@pytest.fixture
def browser(_driver):
    """A `Browser` whose test fails if a page put an error or a warning into the console."""
    driver, downloads = _driver
    for file in downloads.iterdir():
        file.unlink()
    opened = Browser(driver, downloads)
    opened.messages()
    yield opened
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert opened.messages() == []


@pytest.fixture
def dark_system(browser) -> Callable[[], None]:
    """Makes the system's colours dark from here on."""

    def switch() -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark"}]
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    return switch


@pytest.fixture
def phone(browser) -> Callable[[], None]:
    """Makes the window a phone's from here on."""

    def switch() -> None:
        metrics = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    return switch
