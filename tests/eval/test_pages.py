"""Pages: well-formed, self-contained, and no text of a file becomes markup or a script."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from dinov2.eval.pages import (
    ASSETS,
    Markup,
    Section,
    escape,
    image_uri,
    json_text,
    page_html,
    table,
    valued,
    write_page,
)

EVIL = "</script><img src=x onerror=alert(1)> \"quoted\", \u2028 'ü' & <b>"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements in order, and whether all of them are closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def contents(page: str) -> list[tuple[dict, str]]:
    """Attributes and content of each script."""
    found = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)
    return [(dict(re.findall(r'([\w-]+)="([^"]*)"', attributes)), text) for attributes, text in found]


def test_a_page_is_well_formed_and_says_where_things_are():
    sections = [Section("first", EVIL, "<p>text</p>"), Section("second-2", "Second", "<h3>below</h3>", {"a": 1})]
    page = Page(page_html(EVIL, sections, subtitle=EVIL))
    assert page.open == []
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert [tag for tag, _ in page.elements if tag in ("header", "nav", "main")] == ["header", "nav", "main"]
    assert [tag for tag, _ in page.elements if re.fullmatch(r"h\d", tag)] == ["h1", "h2", "h2", "h3"]
    assert page.of("html") == [{"lang": "en"}]
    targets = {attrs["href"].removeprefix("#") for attrs in page.of("a")}
    assert targets == {"content", "first", "second-2"}
    assert targets <= set(ids)
    assert all(attrs["aria-labelledby"] in ids for attrs in page.of("section"))
    assert {"h1", "h2", "title"} <= {tag for tag, text in page.texts if EVIL in text}
    assert page.of("img") == []


def test_a_page_loads_nothing_and_runs_only_its_own_scripts():
    text = page_html("t", [Section("s", "S", "", {"x": EVIL}, scripts=("report.js",), styles=("report.css",))])
    page = Page(text)
    loaded = [attrs.get("src") or attrs.get("href") for tag in ("link", "script", "img") for attrs in page.of(tag)]
    assert [address for address in loaded if address and not address.startswith("data:")] == []
    assert not re.search(r"url\(|@import", text)
    (policy,) = [attrs["content"] for attrs in page.of("meta") if "http-equiv" in attrs]
    assert "default-src 'none'" in policy
    programs = [code for attributes, code in contents(text) if "type" not in attributes]
    assert len(programs) == 1  # named twice, put in once
    for code in programs:
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_data_comes_back_with_all_digits():
    data = {
        EVIL: [0.1 + 0.2, 1e-300, 3, True, None, "</script>", "\u2029", "\udcff"],
        "array": np.array([[1.5, np.nan], [np.inf, -np.inf]]),
        "scalar": np.float32(0.1),
        "path": ASSETS,
    }
    page = page_html("t", [Section("s", "S", "", data)])
    ((_, text),) = [found for found in contents(page) if found[0].get("id") == "data-s"]
    back = json.loads(text)
    assert back[EVIL] == data[EVIL]
    assert back["array"] == [[1.5, "NaN"], ["Infinity", "-Infinity"]]
    assert back["scalar"] == float(np.float32(0.1))
    assert back["path"] == str(ASSETS)
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json_text([]) == "[]"


def test_escape_leaves_nothing_of_html():
    assert Page(f'<p title="{escape(EVIL)}">{escape(EVIL)}</p>').of("p") == [{"title": EVIL}]
    assert escape("a\0b\udc80\x1bc") == "a\ufffdb\ufffd\ufffdc"
    assert escape(Markup("<b>")) == "<b>"
    assert escape(escape("<")) == "&lt;"


def test_a_table_names_rows_columns_and_itself():
    cells = [["row <1>", valued(0.25, "25.0"), "-"], ["row 2", "x", "y"]]
    page = Page(table(["what", "a", "b"], cells, EVIL))
    assert [attrs["scope"] for attrs in page.of("th")] == ["col"] * 3 + ["row"] * 2
    assert [attrs.get("class") for attrs in page.of("td")] == ["number"] * 4
    assert page.of("data") == [{"value": "0.25"}]
    assert [text for tag, text in page.texts if tag == "caption"] == [EVIL]
    (region,) = page.of("div")
    assert region["aria-label"] == EVIL
    assert region["tabindex"] == "0"
    folded = Page(table(["what", "a"], [], "caption", folded_under=EVIL))
    assert [text for tag, text in folded.texts if tag == "summary"] == [EVIL]


def test_pictures_are_inside():
    assert image_uri(b"\x89PNG", "png") == "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    write_page(tmp_path / "new" / "page.html", "t", [Section("s", "\udcff", "")])
    before = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert before.startswith("<!DOCTYPE html>")
    with pytest.raises(FileNotFoundError):
        write_page(tmp_path / "new" / "page.html", "other", [Section("s", "S", "", scripts=("missing.js",))])
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == before


def variables(css: str, selector: str) -> dict[str, str]:
    block = css[css.index(selector) :]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block[: block.index("}")]))


def luminance(colour: str) -> float:
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("selector", [":root {", ':root[data-theme="dark"] {', ":root:not("])
def test_text_stands_out_in_each_colour_scheme(selector):
    colours = variables((ASSETS / "report.css").read_text(), selector)
    grounds = [colours[name] for name in ("background", "surface", "warning")]
    for name in ("ink", "muted", "accent", "good", "bad"):
        assert min(contrast(colours[name], ground) for ground in grounds) >= 4.5, name
    assert contrast(colours["ink"], colours["scale"]) >= 4.5  # counts on coloured fields
    for number in range(1, 9):
        assert contrast(colours[f"series-{number}"], colours["background"]) >= 3


def test_both_ways_to_dark_colours_are_one():
    css = (ASSETS / "report.css").read_text()
    assert variables(css, ':root:not([data-theme="light"]) {') == variables(css, ':root[data-theme="dark"] {')
