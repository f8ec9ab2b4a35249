"""Turn links from docs/ to files of the repository that are not pages into text: a hook of MkDocs.

On GitHub such a link opens the file. The site has only docs/, so there the link would be broken.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\[\]]+)\]\(((?:\.\./)+[^()\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page with `[text](../file)` as `text`, followed by the file's path unless the text is the path.

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
