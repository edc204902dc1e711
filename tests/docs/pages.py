"""Parsing of the pages under docs/."""

import pathlib
import re
from typing import NamedTuple

REPOSITORY = pathlib.Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
README = REPOSITORY / "README.md"


class Block(NamedTuple):
    language: str
    options: str
    line: int
    text: str


def page_id(page):
    return page.name if page == README else page.relative_to(DOCS).as_posix()


def fenced_blocks(page):
    """The fenced blocks of a page; ``line`` is the number of lines before the text."""
    text = page.read_text()
    return [
        Block(match[1], match[2], text.count("\n", 0, match.start(3)), match[3])
        for match in re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def without_code(page):
    """The text of a page without fenced blocks and code spans."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)
