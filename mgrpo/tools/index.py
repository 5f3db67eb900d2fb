"""`mgrpo tools index`: pages from files. A folder of .html, .htm, .txt and .md files, or a .jsonl file of documents.

A file's address is its path in the folder, behind `base` where one is given, so that relative links lead from page to
page. A line of a .jsonl file has `url` or `id`, `text` or `contents`, and maybe `title`; contents in Search-R1's way
begin with the title on a line of its own, in quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urldefrag, urljoin

from mgrpo.tools.page import Heading, Link, Page
from mgrpo.tools.reader import decoded, read_html

HTML, MARKDOWN, TEXT = (".html", ".htm", ".xhtml"), (".md", ".markdown"), (".txt", ".text")
_HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*\s*$")
_LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(\s*<?([^\s)>]+)>?[^)\n]*\)")
_FENCE = re.compile(r"^\s*(```|~~~)")


def read_pages(source: Path, base: str = "", skipped: Callable[[str], None] = print) -> Iterator[Page]:
    """The pages of a folder, in the order of their paths, or of a .jsonl file, in its order. base: what stands before
    the paths in addresses. skipped: called with a line for each file that is no text. Raises ValueError for a source
    that is neither, or holds no page, naming file and line."""
    if source.is_dir():
        suffixes = (*HTML, *MARKDOWN, *TEXT)
        files = sorted(p for p in source.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
        if not files:
            raise ValueError(f"{source}: it holds no file of {', '.join(suffixes)}")
        for file in files:
            try:
                yield _file_page(file, base + file.relative_to(source).as_posix())
            except ValueError as error:
                skipped(f"{file}: left out: {error}")
    elif source.suffix == ".jsonl" and source.is_file():
        yield from _documents(source, base)
    else:
        raise ValueError(f"{source}: expected a folder or a .jsonl file")


def _file_page(file: Path, url: str) -> Page:
    suffix, data = file.suffix.lower(), file.read_bytes()
    if suffix in HTML:
        return read_html(data, url)
    text, _ = decoded(data, max_bytes=len(data) + 1)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if suffix in MARKDOWN:
        return read_markdown(text, url)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return Page(url, first[:200] or url, text.strip("\n"))


def read_markdown(text: str, url: str) -> Page:
    """A page from Markdown: its text as it stands, the headings and links that it holds."""
    outline, at, fenced = [], 0, False
    body = text.strip("\n")
    for line in body.split("\n"):
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced and (found := _HEADING.match(line)) and found[2]:
            outline.append(Heading(found[2], len(found[1]), at))
        at += len(line) + 1
    links: dict[str, Link] = {}
    for words, target in _LINK.findall(body):
        address = _resolved(url, target)
        if address and address != url:
            links.setdefault(address, Link(words, address))
    return Page(url, outline[0].text if outline else url, body, tuple(links.values()), tuple(outline))


def _resolved(url: str, target: str) -> str:
    try:
        return urldefrag(urljoin(url, target))[0]
    except ValueError:
        return ""


def _documents(file: Path, base: str) -> Iterator[Page]:
    with file.open(encoding="utf-8") as lines:
        number = 0
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield _document(json.loads(line), base)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{file}:{number}: {error}") from None
        if not number:
            raise ValueError(f"{file}: it holds no document")


def _document(row: object, base: str) -> Page:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {row!r:.60}")
    url = row.get("url", row.get("id"))
    if url is None or isinstance(url, bool) or not isinstance(url, str | int):
        raise ValueError(f"expected a text `url` or `id`, got {url!r:.60}")
    text, title = row.get("text", row.get("contents")), row.get("title")
    if not isinstance(text, str) or not isinstance(title, str | None):
        raise ValueError("expected a text `text` or `contents`, and a text `title` or none")
    if title is None:
        first, _, rest = text.partition("\n")
        title = first.strip().strip('"')[:200] or str(url)
        text = rest if "contents" in row and "text" not in row and rest.strip() else text
    return Page(base + str(url), title, text.strip("\n"))
