"""Make the images that the README shows: pages of a quickstart's results in Chromium, and maps of its network.

    bash scripts/quickstart.sh && python scripts/make_media.py --quickstart quickstart --output media

Needs Chromium with its driver (Debian: chromium, chromium-driver) and `pip install selenium umap-learn`. All cells
shown are drawn ones.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from dinov2.eval import report
from dinov2.eval.cell_maps import choose_images, make_cell_maps, sheets
from dinov2.eval.explorer import explorer_section
from dinov2.eval.features import read_features
from dinov2.eval.pages.page import write_page
from dinov2.hub.backbones import load_backbone
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking")
CELL = 12  # of the explorer, which is clicked
# where in the window the cell and one of its neighbours are
PLACES_OF_CELLS = """
const data = JSON.parse(document.querySelector(".explorer [data-part=data]").textContent);
const figure = Bokeh.documents[0].get_model_by_name("explorer");
const view = Bokeh.index.roots.find((root) => root.model === figure);
const box = view.canvas_view.el.getBoundingClientRect();
const { x, y } = data.projections[0];
return [arguments[0], data.neighbours[arguments[0]][3]].map((i) => [
  Math.round(box.x + view.frame.x_scale.compute(x[i])), Math.round(box.y + view.frame.y_scale.compute(y[i]))]);
"""
MAPS_SIZE = 192  # px, a side that shows more patches than the network was trained with


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, required=True, help="the folder that scripts/quickstart.sh wrote")
    parser.add_argument("--output", type=Path, default=Path("media"))
    args = parser.parse_args(argv)
    setup_logging()
    args.quickstart, args.output = args.quickstart.absolute(), args.output.absolute()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, open_browser(Path(scratch)) as browser:
        page = Path(scratch) / "report.html"
        sources = [str(args.quickstart / name) for name in ("run", "knn")]
        if report.main([*sources, "--no-explorer", "--title", "Report", "--output", str(page)]):
            raise SystemExit(f"no report of {' and '.join(sources)}: run scripts/quickstart.sh first")
        open_page(browser, page, (1200, 900), "#curves")
        browser.save_screenshot(args.output / "report.png")

        features = read_features(args.quickstart / "knn" / "features_test.h5")
        # the images need not show where the quickstart's folder is
        paths = [os.path.relpath(path, args.quickstart.parent) for path in features.paths]
        os.chdir(args.quickstart.parent)
        page = Path(scratch) / "explorer.html"
        write_page(page, "Cells of the quickstart", [explorer_section({"": replace(features, paths=paths)})])
        open_page(browser, page, (1400, 1000), ".explorer-plot")
        show_neighbour(browser)
        browser.save_screenshot(args.output / "explorer.png")

    # a cell of each class, through the trained network
    paths, names = choose_images(args.quickstart / "cells" / "probe" / "test", 10)
    names = [name.partition("/")[0].replace("_", " ") for name in names]
    maps = make_cell_maps(load_backbone(args.quickstart / "run", MAPS_SIZE), paths, MAPS_SIZE, names=names)
    Image.fromarray(sheets(maps)["cells"]).save(args.output / "cell_maps.png", optimize=True)


def open_page(browser: Any, page: Path, size: tuple[int, int], selector: str) -> None:
    """Open a page, wait for its charts, and scroll to an element."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.set_window_size(*size)
    browser.get(page.resolve().as_uri())
    WebDriverWait(browser, 30).until(lambda _: browser.execute_script("return document.documentElement.dataset.charts"))
    browser.execute_script("document.querySelector(arguments[0]).scrollIntoView({behavior: 'instant'})", selector)


def show_neighbour(browser: Any) -> None:
    """Click on a cell and move the mouse to one of its neighbours."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    mouse = ActionBuilder(browser)
    cell, neighbour = browser.execute_script(PLACES_OF_CELLS, CELL)
    mouse.pointer_action.move_to_location(*cell).click().move_to_location(*neighbour)
    mouse.perform()
    time.sleep(1)  # the plot is drawn again


def open_browser(scratch: Path) -> Any:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise SystemExit("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={scratch / 'profile'}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


if __name__ == "__main__":
    sys.exit(exit_code(main))
