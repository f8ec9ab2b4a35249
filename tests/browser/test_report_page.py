"""The report in a browser: quiet console, both colour schemes, a phone, paper, the keyboard, and no JavaScript."""

import json

import numpy as np
import pytest
from PIL import Image

from dinov2.eval import knn, report
from dinov2.eval.features import Features, write_features
from dinov2.utils.config import load_run_config, write_config

EVIL = "</script><img src=x onerror=alert(1)>"
NAMES = [EVIL, "a class with a name that is long enough to be wider than a phone is, and has a comma", "c"]
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
TOO_WIDE = """
return [...document.querySelectorAll("body *")]
  .filter((element) => !element.closest(".scroll, pre, .skip, details:not([open])"))
  .filter((element) => element.getBoundingClientRect().right > window.innerWidth + 1)
  .map((element) => element.outerHTML.slice(0, 120));
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report on a run and on results of oddly named classes."""
    folder = tmp_path_factory.mktemp("report")
    run = folder / "a run with a long name, too long for the width of a phone that is held upright"
    run.mkdir()
    write_config(load_run_config(None, ["train.seed=7"]), run / "config.yaml")
    (run / "training_metrics.json").write_text(
        "".join(json.dumps({"iteration": i, "total_loss": 10 / (i + 1), "lr": 1e-5 * i}) + "\n" for i in range(50))
    )
    labels = np.arange(60) % 3
    values = (np.random.default_rng(0).normal(size=(60, 4)) + labels[:, None]).astype(np.float32)
    paths = [f"/cells/{EVIL}/{i}.png" for i in range(60)]
    write_features(folder / "f.h5", Features(values, labels, NAMES, paths))
    knn.main(["--features", str(folder / "f.h5"), "--output-dir", str(folder / "knn"), "--k", "5", "--folds", "2"])
    output = folder / "report.html"
    report.main([str(run), str(folder / "knn"), "--no-explorer", "--output", str(output)])
    return output


def test_dark_colours_follow_the_system_and_the_button(browser, dark_system, page):
    browser.open(page)
    browser.js("localStorage.clear()")
    light = browser.js(f"return {BACKGROUND}")
    dark_system()
    dark = browser.wait(f"{BACKGROUND} !== '{light}' && {BACKGROUND}")
    browser.button("Dark or light").click()
    browser.wait(f"{BACKGROUND} === '{light}'")
    browser.reload()
    browser.wait(f"{BACKGROUND} === '{light}'")  # the choice is kept
    browser.button("Dark or light").click()
    browser.wait(f"{BACKGROUND} === '{dark}'")
    browser.js("localStorage.clear()")


def test_charts_are_drawn_on_the_page_s_background_and_name_their_numbers(browser, page, tmp_path):
    browser.open(page)
    chart = browser.find("#curves .chart")
    browser.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart)
    chart.screenshot(str(tmp_path / "chart.png"))
    pixels = np.asarray(Image.open(tmp_path / "chart.png").convert("RGB")).reshape(-1, 3)
    assert (pixels == 255).all(axis=1).mean() > 0.5, "the page's white shows through"
    assert (np.abs(pixels - np.array([0x2F, 0x86, 0xD6])).max(axis=1) < 30).sum() > 50, "the line"
    assert "from 10 to 0.2, lowest 0.2, highest 10" in chart.get_attribute("aria-label")


def test_a_phone_shows_all_of_the_width(browser, phone, page):
    phone()
    browser.open(page)
    assert browser.js("return document.documentElement.scrollWidth") <= 390
    assert browser.js(TOO_WIDE) == []
    browser.js("for (const part of document.querySelectorAll('details')) part.open = true")
    assert browser.js("return document.documentElement.scrollWidth") <= 390
    assert browser.js(TOO_WIDE) == []


def test_the_keyboard_reaches_contents_tables_and_folded_parts(browser, page):
    browser.open(page)
    browser.press("TAB")
    assert browser.js("return document.activeElement.textContent") == "Skip to the content"
    seen = set()
    while True:
        browser.press("TAB")
        name = browser.js("return document.activeElement.className || document.activeElement.localName")
        if name == "body":  # once around
            break
        seen.add(name)
        outline = browser.js("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", browser.js("return document.activeElement.outerHTML.slice(0, 200)")
    assert {"a", "scroll", "summary", "only-with-script no-print"} <= seen


def test_nothing_of_a_file_became_an_element(browser, page):
    browser.open(page)
    assert browser.js("return document.querySelectorAll('img').length") == 0
    assert browser.js("return document.querySelectorAll('.matrix').length") > 0
    captions = browser.js("return [...document.querySelectorAll('th')].map((cell) => cell.textContent)")
    assert EVIL in captions
    assert browser.js("return JSON.parse(document.getElementById('data-results').textContent).results[0].name") == "knn"


def test_paper_is_white_and_shows_what_is_folded(browser, dark_system, page):
    dark_system()
    browser.open(page)
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.wait(f"{BACKGROUND} === 'rgb(255, 255, 255)'")
    assert browser.js("return getComputedStyle(document.querySelector('nav')).display") == "none"
    folded = "[...document.querySelectorAll('details:not([open]) > :last-child')]"
    heights = f"return {folded}.map((element) => element.checkVisibility() && element.getBoundingClientRect().height)"
    assert len(browser.js(heights)) > 3
    assert all(browser.js(heights))
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert not any(browser.js(heights))


def test_without_javascript_everything_static_is_there(browser, page):
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open(page)
        texts = [element.text for element in browser.driver.find_elements("css selector", "h2")]
        assert {"At a glance", "Results", "Training curves", "Settings"} <= set(texts)
        assert not browser.find("#theme").is_displayed()
        assert browser.find(".matrix").size["width"] > 100
        assert "need JavaScript" in browser.find("noscript").text
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
