"""Pages from HTML: title, outline, paragraphs, lists, tables and links, without scripts, styles and navigation.

The text is what a person would copy: blocks divided by empty lines, headings and list items on lines of their own (an
item begins with "- "), table rows as "cell | cell", preformatted text as it stands. A table that lays out a page (it
holds headings or tables) is read as blocks. Markup may be broken in any way; libxml2 mends it.

Encoding: a byte-order mark, else the header's charset, else the document's own <meta>, else UTF-8 where the bytes are
that, else Windows-1252.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urldefrag, urljoin, urlsplit

from mgrpo.errors import ConfigError
from mgrpo.tools.page import Heading, Link, Page

MAX_BYTES = 5_000_000  # of a document; the rest is cut off
MAX_CHARS = 1_000_000  # of a page's text
CUT = "[the page is longer than what was read]"

_DROPPED = {
    "script", "style", "noscript", "template", "head", "nav", "footer", "svg", "math", "iframe", "object",
    "embed", "canvas", "video", "audio", "map", "button", "select", "textarea", "input", "datalist",
    "dialog",
}  # fmt: skip
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLOCKS = _HEADINGS.keys() | {
    "p", "div", "section", "article", "main", "header", "aside", "body", "html", "ul", "ol", "dl", "dt",
    "dd", "li", "table", "thead", "tbody", "tfoot", "tr", "caption", "pre", "blockquote", "figure",
    "figcaption", "address", "form", "fieldset", "details", "summary", "hr", "center",
}  # fmt: skip
_TIGHT = {"li", "dt", "dd", "tr"}  # blocks that follow the one before without an empty line
_META = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]+)", re.IGNORECASE)
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([A-Za-z0-9_.:-]+)", re.IGNORECASE)
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


def read_html(
    data: bytes | str, url: str = "", *, content_type: str = "", max_bytes: int = MAX_BYTES
) -> Page:
    """The page in an HTML document. url: its address, which links are resolved against; it may be a relative path.
    content_type: of the HTTP answer. Raises ValueError for bytes that are no text, e.g. a PDF."""
    text, whole = decoded(data, content_type, max_bytes)
    root, complete = _tree(text)
    whole = whole and complete
    if root is None:
        return Page(url, url, "" if whole else CUT)
    base = next((str(e.get("href")).strip() for e in root.iter("base") if e.get("href")), "")
    title = next((_inline(element) for element in root.iter("title") if _inline(element)), "")
    reader = _Reader(_joined(url, base) if base else url, url)
    reader.read(root)
    body, outline = reader.text()
    if not title:
        title = outline[0].text if outline else url
    if len(body) > MAX_CHARS:
        body, whole = body[:MAX_CHARS].rstrip(), False
        outline = [heading for heading in outline if heading.start < len(body)]
    if not whole:
        body = f"{body}\n\n{CUT}".lstrip("\n")
    return Page(url, title, body, tuple(reader.links.values()), tuple(outline))


def decoded(data: bytes | str, content_type: str = "", max_bytes: int = MAX_BYTES) -> tuple[str, bool]:
    """(text, whether it is all of it) of a document of at most `max_bytes` bytes or characters. Raises ValueError for
    bytes that are no text."""
    cut = data[:max_bytes]
    if isinstance(cut, str):
        return cut.replace("\x00", ""), len(data) <= max_bytes
    for mark, encoding in _MARKS:
        if cut.startswith(mark):
            return cut[len(mark) :].decode(encoding, "replace").replace("\x00", ""), len(data) <= max_bytes
    if b"\x00" in cut[:4096] or cut.startswith(b"%PDF-"):
        raise ValueError("the document is binary, expected text")
    return cut.decode(_encoding(cut, content_type), "replace").replace("\x00", ""), len(data) <= max_bytes


def _encoding(data: bytes, content_type: str) -> str:
    header, meta = _CHARSET.search(content_type), _META.search(data[:4096])
    for name in (header[1] if header else "", meta[1].decode("ascii") if meta else ""):
        try:
            found = codecs.lookup(name).name if name else ""
        except LookupError:
            continue
        if found == "iso8859-1" or found == "ascii":
            return "cp1252"  # as every browser reads them
        if found and not found.startswith("utf-16") and found in _TEXT_CODECS:
            return found
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        # the cut may have split the last character
        return "utf-8" if error.start > len(data) - 4 and error.end == len(data) else "cp1252"
    return "utf-8"


def _text_codecs() -> Iterator[str]:
    """Codecs from bytes to text: an encoding that a page names is chosen by whoever wrote the page."""
    from encodings.aliases import aliases

    for name in {*aliases.values()}:
        try:
            info = codecs.lookup(name)
        except LookupError:
            continue
        if getattr(info, "_is_text_encoding", True):
            yield info.name


_TEXT_CODECS = frozenset(_text_codecs())


def _tree(text: str) -> tuple[Any, bool]:
    """(root element, whether all of the document is below it); the root of an empty one is None."""
    try:
        from lxml import etree
    except ImportError:
        raise ConfigError('reading HTML needs lxml; pip install "mgrpo[research]"') from None
    parser = etree.HTMLParser(
        encoding="utf-8", remove_comments=True, remove_pis=True, no_network=True, huge_tree=True
    )
    try:
        root = etree.fromstring(text.encode("utf-8", "replace"), parser)
    except etree.LxmlError:  # of nothing but white space or comments
        root = None
    return root, all(error.type_name != "ERR_RESOURCE_LIMIT" for error in parser.error_log)


class _Reader:
    """Walks a tree, without recursion: pages nest as deep as they like."""

    def __init__(self, base: str, own: str) -> None:
        """base: what links are resolved against; own: the page's address, to which links lead nowhere."""
        self._base, self._own = base, urldefrag(own)[0]
        self._blocks: list[
            tuple[str, str, int]
        ] = []  # (text, what divides it from the one before, heading's level)
        self._line: list[str] = []  # of the block that is being read
        self._first = ""  # how the block begins: an item's "- "
        self._before = "\n\n"
        self._tight = self._after_tight = False  # whether this block, and the one before, is an item or a row
        self._level = 0
        self.links: dict[str, Link] = {}

    def read(self, root: Any) -> None:
        """Everything below `root`."""
        stack: list[tuple[Any, bool]] = [(root, False)]
        while stack:
            element, leaving = stack.pop()
            if leaving:
                self._leave(element)
                self._say(element.tail)
            elif not isinstance(element.tag, str) or _hidden(element):
                self._say(element.tail)
            elif element.tag == "pre":
                self._end()
                self._links(element)
                self._block("".join(_shown(element)).strip("\n").rstrip(), "\n\n")
                self._say(element.tail)
            elif element.tag == "table" and not _lays_out(element):
                self._table(element)
                self._say(element.tail)
            else:
                self._enter(element)
                self._say(element.text)
                stack.append((element, True))
                stack += [(child, False) for child in reversed(element)]
        self._end()

    def text(self) -> tuple[str, list[Heading]]:
        """The page's text and its outline."""
        parts: list[str] = []
        outline, at = [], 0
        for text, before, level in self._blocks:
            if parts:
                parts.append(before)
                at += len(before)
            if level:
                outline.append(Heading(text, level, at))
            parts.append(text)
            at += len(text)
        return "".join(parts), outline

    def _enter(self, element: Any) -> None:
        tag = element.tag
        if tag in _BLOCKS:
            self._end()
            if tag in _TIGHT:
                self._before = "\n" if self._after_tight else "\n\n"
                self._tight = True
            if tag == "li":
                self._first = "- "
            self._level = _HEADINGS.get(tag, self._level)
        elif tag == "br":
            self._line.append("\n")
        elif tag == "img" and element.get("alt"):
            self._say(f" {element.get('alt')} ")
        elif tag in ("td", "th"):
            self._end()

    def _leave(self, element: Any) -> None:
        if element.tag == "a" and element.get("href"):
            self._link(str(element.get("href")), _inline(element))
        if element.tag in _BLOCKS or element.tag in ("td", "th"):
            self._end()
            if element.tag in _HEADINGS:
                self._level = 0
            elif element.tag in ("ul", "ol", "dl", "table"):
                self._before = "\n\n"

    def _say(self, text: str | None) -> None:
        if text:
            self._line.append(re.sub(r"\s+", " ", text))

    def _end(self) -> None:
        """The block that was read is over."""
        lines = (" ".join(line.split()) for line in "".join(self._line).split("\n"))
        self._line = []
        self._block("\n".join(line for line in lines if line), self._before)

    def _block(self, text: str, before: str) -> None:
        if text.strip():
            level = self._level
            self._blocks.append((text if level == 0 else " ".join(text.split()), before, level))
            if self._first and level == 0:
                self._blocks[-1] = (self._first + text, before, 0)
            self._first, self._before = "", "\n\n"
            self._after_tight, self._tight = self._tight, False

    def _table(self, table: Any) -> None:
        self._end()
        before = "\n\n"
        for row in table.iter("tr", "caption"):
            cells = [row] if row.tag == "caption" else [cell for cell in row if cell.tag in ("td", "th")]
            shown = [_inline(cell) for cell in cells]
            for cell in cells:
                self._links(cell)
            if any(shown):
                self._block(" | ".join(shown), before)
                before = "\n"

    def _links(self, element: Any) -> None:
        for anchor in element.iter("a"):
            if anchor.get("href"):
                self._link(str(anchor.get("href")), _inline(anchor))

    def _link(self, href: str, text: str) -> None:
        url = _joined(self._base, href)
        if url and url != self._own and (url not in self.links or (text and not self.links[url].text)):
            self.links[url] = Link(text, url)


def _joined(base: str, href: str) -> str:
    """An absolute address without its fragment; empty for what no reader can follow."""
    try:
        url = urldefrag(urljoin(base, href.strip()))[0]
        parts = urlsplit(url)
    except ValueError:
        return ""
    if parts.scheme in ("http", "https"):
        return url if parts.netloc else ""
    return url if not parts.scheme and not urlsplit(base).scheme else ""


def _hidden(element: Any) -> bool:
    return (
        element.tag in _DROPPED
        or element.get("hidden") is not None
        or element.get("aria-hidden") == "true"
        or element.get("role") in ("navigation", "search", "menu", "menubar")
        or re.search(r"display\s*:\s*none", element.get("style") or "", re.IGNORECASE) is not None
    )


def _lays_out(table: Any) -> bool:
    """Whether a table holds a page's parts and not data."""
    return next(table.iterdescendants("table", "pre", *_HEADINGS), None) is not None


def _shown(element: Any) -> Iterator[str]:
    """The texts in an element that a reader sees, without recursion."""
    stack: list[tuple[Any, bool]] = [(element, False)]
    while stack:
        current, leaving = stack.pop()
        if leaving:
            yield " " if current.tag in _BLOCKS else ""
            yield current.tail or ""
            continue
        seen = isinstance(current.tag, str) and (current is element or not _hidden(current))
        if seen:
            block = current.tag in _BLOCKS and current is not element
            yield " " if block else "\n" if current.tag == "br" else ""
            yield current.text or (f" {current.get('alt') or ''} " if current.tag == "img" else "")
        if current is not element:
            stack.append((current, True))
        if seen:
            stack += [(child, False) for child in reversed(current)]


def _inline(element: Any) -> str:
    return " ".join("".join(_shown(element)).split())
