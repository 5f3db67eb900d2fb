"""The HTML reader: what a person would copy from a page, from markup, encodings and sizes of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.tools.index import read_markdown, read_pages
from mgrpo.tools.page import Heading, Link, Page
from mgrpo.tools.reader import CUT, decoded, read_html

POSTGRESQL = Path("/usr/share/doc/postgresql-doc-15/html")

ARTICLE = """<!DOCTYPE html><html><head><title>  Fiji &amp;
 Tonga </title><style>p { color: red }</style><script>alert("no")</script></head><body>
<nav><a href="/home">Home</a></nav><div role="navigation">Menu</div><p hidden>unseen</p>
<p style="Display : none">unseen</p>
<h1>Two <em>countries</em></h1>
<p>First   paragraph with a <a href="suva.html#top">link
to Suva</a>.<br>A new line.
<p>Unclosed<div>A block<script>no()</script> goes on</div>
<ul><li>one<li>two <ul><li>nested</ul><li><p>three</p></ul>
<table><caption>Areas</caption><tr><th>Name<th>km&sup2;<tr><td>Fiji<td>18&nbsp;274 <a href="//x.org/a?b=1&amp;c=2">more
</a><tr><td><td></table>
<table><tr><td><h2>Layout</h2><p>left<td>right</table>
<pre>
  indented
    <a href="/c">code</a></pre>
<dl><dt>Term<dd>Meaning</dl>
<a href="/all"><h3>Whole block</h3><p>is a link</p></a>
<a href="javascript:x()">script</a> <a href="mailto:a@b">mail</a> <a href="http://[bad">bad</a> <a href="#here">here</a>
<img alt="A map"> <select><option>choice</select> the end</body></html>"""

TEXT = """Two countries

First paragraph with a link to Suva.
A new line.

Unclosed

A block goes on

- one
- two
- nested
- three

Areas
Name | km²
Fiji | 18 274 more

Layout

left

right

  indented
    code

Term
Meaning

Whole block

is a link

script mail bad here A map the end"""


def test_an_article_reads_as_a_person_would_copy_it() -> None:
    """Word for word: title, blocks, lists, tables as rows, code as it stands, absolute links; no script, style,
    navigation or what is hidden."""
    page = read_html(ARTICLE, "https://docs.org/fj/index.html")
    assert page.title == "Fiji & Tonga" and page.text == TEXT
    assert page.links == (
        Link("link to Suva", "https://docs.org/fj/suva.html"),
        Link("more", "https://x.org/a?b=1&c=2"),
        Link("code", "https://docs.org/c"),
        Link("Whole block is a link", "https://docs.org/all"),
    )
    assert [(h.text, h.level) for h in page.outline] == [
        ("Two countries", 1),
        ("Layout", 2),
        ("Whole block", 3),
    ]
    assert all(page.text[h.start :].startswith(h.text) for h in page.outline)


@pytest.mark.parametrize(
    ("base", "href", "url"),
    [
        ("https://a.org/x/y.html", "z.html", "https://a.org/x/z.html"),
        ("https://a.org/x/y.html", "../z", "https://a.org/z"),
        ("x/y.html", "../z.html", "z.html"),
        ("x/y.html", "https://b.org/", "https://b.org/"),
        ("x/y.html", "javascript:1", None),
        ("https://a.org/x", "ftp://a.org/f", None),
        ("https://a.org/x", " \n/y ", "https://a.org/y"),
        ("https://a.org/x", "?q=1#f", "https://a.org/x?q=1"),
        ("https://a.org/x", "#f", None),
    ],
)
def test_links_are_absolute_or_lead_within_the_folder(base: str, href: str, url: str | None) -> None:
    """Or they are none that a reader can follow."""
    links = read_html(f'<a href="{href}">words</a>', base).links
    assert links == (() if url is None else (Link("words", url),))


def test_a_base_element_counts_and_links_come_once() -> None:
    """The first link with words keeps its place; a picture's link takes the words of the next of the same address."""
    page = read_html(
        '<base href="/b/"><a href=x><img></a><a href=x>words</a><a href=x>others</a>', "https://a.org/p"
    )
    assert page.links == (Link("words", "https://a.org/b/x"),)


@pytest.mark.parametrize(
    ("data", "header"),
    [
        ("<p>é“”ł</p>".encode(), ""),
        (b"\xef\xbb\xbf" + "<p>é“”ł</p>".encode(), "text/html; charset=iso-8859-1"),
        ("<p>é“”ł</p>".encode("utf-16-le"), "text/html; charset=utf-16"),
        ("<meta charset=iso-8859-2><p>é“”ł</p>".replace("“”", "").encode("iso-8859-2"), ""),
        (
            '<meta http-equiv="Content-Type" content="text/html; charset=windows-1250"><p>é“”ł</p>'.encode(
                "cp1250"
            ),
            "",
        ),
        ("<meta charset=iso-8859-1><p>é“”ł</p>".encode(), "text/html;charset=UTF-8"),
        ('<meta charset="no-such"><p>é“”ł</p>'.encode(), "charset=nonsense"),
        ('<meta charset="hex"><p>é“”ł</p>'.encode(), ""),  # of Python's codecs, and none of texts
        ("<?xml version='1.0' encoding='utf-8'?><p>é“”ł</p>".encode(), ""),
    ],
)
def test_encodings(data: bytes, header: str) -> None:
    """Mark, header, meta, then UTF-8; names that are none do not count."""
    if data.startswith(b"<\x00"):
        data = b"\xff\xfe" + data
    assert read_html(data, "u", content_type=header).text in ("é“”ł", "éł")


def test_bytes_of_no_known_encoding_are_windows_1252() -> None:
    """As in every browser, also where they call themselves Latin-1; and a UTF-8 text may be cut within a character."""
    assert read_html(b"<p>caf\xe9 \x93q\x94</p>").text == "café “q”"
    assert read_html(b"<meta charset=latin1><p>caf\xe9 \x93q\x94</p>").text == "café “q”"
    assert decoded("aé".encode(), max_bytes=2)[0] == "a\ufffd"


@pytest.mark.parametrize("data", [b"%PDF-1.7 ...", b"\x89PNG\r\n\x1a\n\x00\x00", b"GIF89a\x00\x01"])
def test_what_is_no_text_is_refused(data: bytes) -> None:
    """A page made of a picture's bytes would be noise."""
    with pytest.raises(ValueError, match="is binary"):
        read_html(data)


def test_sizes_are_limited_and_the_cut_is_seen() -> None:
    """Bytes, characters and depth; what was read of the page stands before the mark."""
    page = read_html("<h1>Title</h1>" + "<p>words</p>" * 1000, max_bytes=2000)
    assert page.text.startswith("Title\n\nwords\n\nwords") and page.text.endswith(f"\n\n{CUT}")
    assert read_html("<p>" + "word " * 300_000).text.endswith(CUT)
    deep = read_html("<p>before</p>" + "<div>" * 50_000 + "deep")
    assert deep.text == f"before\n\n{CUT}"
    assert read_html("<p>all</p>", max_bytes=10).text == "all"


@pytest.mark.parametrize(
    "html", ["", " ", "<!-- no -->", "<html></html>", "\x00", "<script>x</script>", "<?pi?>"]
)
def test_documents_that_say_nothing(html: str) -> None:
    """Their address is their title."""
    assert read_html(html, "https://a.org") == Page("https://a.org", "https://a.org", "")


SNIPPETS = ["<p>", "</p>", "<table>", "<tr>", "<td>", "</table>", "<a href=x>", "</a>", "<h2>", "</h2>", "<li>",
            "<ul>", "</ul>", "<pre>", "<br>", "<!--", "-->", "<script>", "</script>", "&amp;", "&#0;", "&#xD800;", "<",
            "é", "word", " ", "\n", "<![CDATA[", "]]>", "<svg>", "<title>", "</title>", '<x y="', "\ud800",
            "<template>"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(SNIPPETS), max_size=25).map("".join)
    | st.text(max_size=40)
    | st.binary(max_size=40)
)
def test_broken_markup_reads_as_something(html: str | bytes) -> None:
    """Nothing raises but binary data; headings stand where the outline says; the text can be encoded and has no
    markup's ends."""
    try:
        page = read_html(html, "https://a.org/")
    except ValueError:
        assert isinstance(html, bytes) and (b"\x00" in html or html.startswith(b"%PDF-"))
        return
    assert all(page.text[h.start :].startswith(h.text) and h.text for h in page.outline)
    page.text.encode()
    assert page.text == page.text.strip("\n")


# -- folders and files --


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    """Links between its files lead from page to page; what is no text is reported and left out."""
    (tmp_path / "b").mkdir()
    (tmp_path / "a.html").write_text('<title>A</title><p>See <a href="b/c.md">C</a>.')
    (tmp_path / "b" / "c.md").write_text(
        "# C\n\nBack to [A](../a.html).\n\n```\n# no heading\n```\n## Part ##\n"
    )
    (tmp_path / "b" / "d.txt").write_bytes(b"\xef\xbb\xbf\r\nFirst line\r\n\r\nmore # no heading\r\n")
    (tmp_path / "e.html").write_bytes(b"%PDF-1.7")
    (tmp_path / "f.png").write_bytes(b"\x89PNG")
    skipped: list[str] = []
    pages = list(read_pages(tmp_path, skipped=skipped.append))
    assert pages == [
        Page("a.html", "A", "See C.", (Link("C", "b/c.md"),)),
        Page(
            "b/c.md",
            "C",
            "# C\n\nBack to [A](../a.html).\n\n```\n# no heading\n```\n## Part ##",
            (Link("A", "a.html"),),
            (Heading("C", 1, 0), Heading("Part", 2, 51)),
        ),
        Page("b/d.txt", "First line", "First line\n\nmore # no heading"),
    ]
    assert len(skipped) == 1 and "e.html: left out: the document is binary" in skipped[0]
    assert [p.url for p in read_pages(tmp_path, "https://x.org/", skipped.append)][:2] == [
        "https://x.org/a.html",
        "https://x.org/b/c.md",
    ]
    empty = tmp_path / "b" / "empty"
    empty.mkdir()
    for source, words in (
        (empty, "holds no file of"),
        (tmp_path / "f.png", "expected a folder or a .jsonl file"),
    ):
        with pytest.raises(ValueError, match=words):
            list(read_pages(source))


def test_documents_in_lines(tmp_path: Path) -> None:
    """Our keys and Search-R1's; a line that is no document is named by its number."""
    file = tmp_path / "d.jsonl"
    file.write_text(
        '{"url": "https://x.org/1", "title": "T", "text": "words"}\n\n'
        '{"id": "12", "contents": "\\"Fiji\\"\\nAn island country."}\n'
        '{"id": 13, "contents": "one line"}\n'
        '{"id": "14", "text": "First.\\nSecond."}\n'
    )
    assert list(read_pages(file)) == [
        Page("https://x.org/1", "T", "words"),
        Page("12", "Fiji", "An island country."),
        Page("13", "one line", "one line"),
        Page("14", "First.", "First.\nSecond."),
    ]
    for line, words in (
        ("{", r"d\.jsonl:1: "),
        ("[]", "expected an object, got"),
        ('{"text": "a"}', "expected a text `url` or `id`, got None"),
        ('{"id": "1"}', "expected a text `text` or `contents`"),
        ('{"id": "1", "text": "a", "title": 5}', "a text `title` or none"),
        ("", "it holds no document"),
    ):
        file.write_text(line)
        with pytest.raises(ValueError, match=words):
            list(read_pages(file))


def test_markdown_links() -> None:
    """Pictures are none, titles and angle brackets are not of the address, and one that cannot be read is left."""
    page = read_markdown('![p](x.png) [a](<b.md> "t") [c](https://x.org/a_(b) [d](//[) [e](#f)', "z/a.md")
    assert [link.url for link in page.links] == ["z/b.md", "https://x.org/a_(b"]


@pytest.mark.skipif(not POSTGRESQL.is_dir(), reason="postgresql-doc-15 is not installed")
def test_the_manual_of_postgresql() -> None:
    """Real pages: each has a title, text and links, and nearly every link within leads to a page."""
    names = sorted(path.name for path in POSTGRESQL.glob("*.html"))
    pages = [read_html((POSTGRESQL / name).read_bytes(), name) for name in names[::8]]
    assert len(pages) > 100 and all(page.text and page.title for page in pages)
    within = [link.url for page in pages for link in page.links if "://" not in link.url]
    assert len(within) > 1000 and sum(url in names for url in within) > 0.99 * len(within)
    select = read_html((POSTGRESQL / "sql-select.html").read_bytes())
    assert select.title == "SELECT" and "Synopsis" in [h.text for h in select.outline]
    assert "SELECT retrieves rows from zero or more tables." in select.text
    assert "[ WITH [ RECURSIVE ] with_query [, ...] ]\nSELECT [ ALL | DISTINCT" in select.text
