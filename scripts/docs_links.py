"""A hook of MkDocs: links from docs/ to files of the repository that are not pages become their paths as text.

Read in the repository such a link leads to the file; the site holds docs/ alone, so there it would lead nowhere.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\[\]]+)\]\(((?:\.\./)+[^()\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text with `[text](../file)` as `text`, and the file's path in brackets where the text is another.

    Raises:
        FileNotFoundError: there is no such file.
    """
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def as_text(link: re.Match[str]) -> str:
        text, target = link[1], posixpath.normpath(posixpath.join(folder, link[2].partition("#")[0]))
        if target.startswith("docs/"):
            return link[0]  # a page, which MkDocs checks
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{page.file.src_uri}: {link[0]} leads to {target}, which does not exist")
        return text if text.strip("`") == target else f"{text} (`{target}`)"

    return LINK.sub(as_text, markdown)
