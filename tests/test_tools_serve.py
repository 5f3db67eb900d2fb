"""`mgrpo tools`: an index from files, and a corpus over Search-R1's protocol and MCP, as their own clients use them."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client

from mgrpo.errors import ConfigError
from mgrpo.tools.corpus import Corpus, Link, Page
from mgrpo.tools.corpus_tools import corpus_tools
from mgrpo.tools.serve import application, mcp_server, serve
from mgrpo.tools.toolset import ToolSet
from tests.serving import serving

PAGES = [
    Page("https://x.org/fj", "Fiji", "The capital of Fiji is Suva.", (Link("Suva", "https://x.org/suva"),)),
    Page("https://x.org/to", "Tonga", "The capital of Tonga is Nukuʻalofa."),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    built = Corpus.build(tmp_path_factory.mktemp("corpus") / "c.sqlite", PAGES)
    yield built
    built.close()


@pytest.fixture(scope="module")
def url(corpus: Corpus) -> Iterator[str]:
    with serving(application(corpus, k=1)) as address:
        yield address


def post(url: str, **body: Any) -> Any:
    answer = httpx2.post(url, json=body, timeout=30.0)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_search_r1_asks_with_and_without_scores(url: str, corpus: Corpus) -> None:
    """Both shapes of its answers: one list for each query, documents with id and contents whose first line is the
    title; the queries' order is kept."""
    body = {"queries": ["capital of Tonga", "Suva Fiji", "zzz"], "topk": 2}
    scored = post(f"{url}/retrieve", **body, return_scores=True)["result"]
    assert [[entry["document"]["id"] for entry in found] for found in scored] == [
        ["https://x.org/to", "https://x.org/fj"],
        ["https://x.org/fj"],
        [],
    ]
    first = scored[0][0]
    assert first["score"] == pytest.approx(corpus.search("capital of Tonga", 1)[0].score)
    assert first["document"]["contents"] == '"Tonga"\nThe capital of Tonga is Nukuʻalofa.'
    bare = post(f"{url}/retrieve", **body)["result"]
    assert bare == [[entry["document"] for entry in found] for found in scored]
    assert post(f"{url}/retrieve", queries=["capital"])["result"] == [
        [bare[0][0] | bare[1][0]]
    ]  # the server's own k


def test_access_gives_pages_or_null(url: str) -> None:
    """In the order of the addresses."""
    got = post(f"{url}/access", urls=["x.org/to", "https://x.org/none"])["result"]
    assert got[0]["contents"] == '"Tonga"\nThe capital of Tonga is Nukuʻalofa.' and got[1] is None


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("retrieve", b"{", "is no JSON"),
        ("retrieve", b"[" * 100_000, "is no JSON"),
        ("retrieve", b"[]", "no JSON object"),
        ("retrieve", b"{}", "queries is no list"),
        ("retrieve", b'{"queries": "a"}', "queries is no list"),
        ("retrieve", json.dumps({"queries": ["a"] * 513}).encode(), "at most 512"),
        ("retrieve", b'{"queries": ["a"], "topk": 0}', "topk 0 is not"),
        ("retrieve", b'{"queries": ["a"], "topk": true}', "topk True is not"),
        ("retrieve", b'{"queries": ["a"], "return_scores": 1}', "return_scores 1 is neither"),
        ("access", b'{"urls": [1]}', "urls is no list"),
        ("access", b'{"urls": ["' + b"a" * 5_000_000 + b'"]}', "more than 4194304 bytes"),
    ],
)
def test_requests_that_are_wrong_are_answered_422(url: str, path: str, body: bytes, words: str) -> None:
    """With what is wrong; the server goes on."""
    answer = httpx2.post(f"{url}/{path}", content=body, timeout=30.0)
    assert answer.status_code == 422 and words in answer.json()["detail"]


def test_only_loopback_is_answered(url: str, corpus: Corpus) -> None:
    """A name that resolves to this machine is not enough, on any path; health names the corpus."""
    for path, body in (("/retrieve", {"queries": ["a"]}), ("/access", {"urls": []}), ("/mcp", {})):
        answer = httpx2.post(url + path, json=body, headers={"Host": "evil.example"}, timeout=30.0)
        assert answer.status_code in (403, 421), path
    health = httpx2.get(f"{url}/health", timeout=30.0).json()
    assert health == {"status": "ok", "pages": 2, "digest": corpus.digest}


async def use(client: Client) -> None:
    """What an agent does over MCP: list, search, visit, and two mistakes."""
    listed = (await client.list_tools()).tools
    assert [tool.name for tool in listed] == ["search", "visit"]
    assert listed[1].input_schema["required"] == ["url"] and "Read a page." in str(listed[1].description)
    found = await client.call_tool("search", {"query": "capital of Fiji"})
    text = found.content[0].text
    assert not found.is_error and text.startswith("[1] Fiji\nhttps://x.org/fj\nThe capital of Fiji is Suva.")
    page = await client.call_tool("visit", {"url": "https://x.org/fj"})
    assert "Links:\n[1] Suva - https://x.org/suva" in page.content[0].text
    for name, arguments, words in (
        ("visit", {"url": "nowhere"}, "There is no page"),
        ("find", {}, "There is no tool"),
    ):
        wrong = await client.call_tool(name, arguments)
        assert wrong.is_error and words in wrong.content[0].text


def test_an_mcp_client_in_memory(corpus: Corpus) -> None:
    """The server's tools are the corpus' tools, word for word."""

    async def run() -> None:
        async with Client(mcp_server(ToolSet(corpus_tools(corpus)))) as client:
            await use(client)

    asyncio.run(run())


def test_an_mcp_client_over_http(url: str) -> None:
    """Streamable HTTP, several clients at once."""

    async def one() -> None:
        async with Client(f"{url}/mcp") as client:
            await use(client)

    async def run() -> None:
        await asyncio.gather(one(), one())

    asyncio.run(run())


def test_a_port_in_use_is_named(corpus: Corpus, url: str) -> None:
    """Before anything is served."""
    with pytest.raises(ConfigError, match=r"--port \d+: cannot listen there"):
        serve(corpus.path, "127.0.0.1", int(url.rsplit(":", 1)[1]))
    with pytest.raises(ConfigError, match="no such file"):
        serve(Path("none.sqlite"), "127.0.0.1", 0)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "mgrpo", "tools", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60.0)


def test_index_and_serve_from_the_command_line(tmp_path: Path) -> None:
    """A folder becomes a corpus, the corpus a server that ends with SIGINT; mistakes are one line and status 2."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "fiji.html").write_text("<title>Fiji</title><p>Its capital is Suva.")
    (tmp_path / "docs" / "bad.html").write_bytes(b"%PDF-")
    made = command("index", tmp_path / "docs", "--out", tmp_path / "c.sqlite", "--base", "https://d.org/")
    assert made.returncode == 0, made.stderr
    assert "bad.html: left out" in made.stdout
    made_corpus = Corpus.open(tmp_path / "c.sqlite")
    digest = made_corpus.digest
    made_corpus.close()
    assert f"c.sqlite: 1 pages, 1 passages, digest {digest}" in made.stdout
    for source, out in ((tmp_path / "none", "x"), (tmp_path / "docs" / "fiji.html", "x"), (tmp_path, "no/x")):
        wrong = command("index", source, "--out", tmp_path / out)
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stderr.startswith("error: ")
    server = subprocess.Popen(
        [sys.executable, "-m", "mgrpo", "tools", "serve", str(tmp_path / "c.sqlite"), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        lines = [server.stdout.readline(), server.stdout.readline()]
        assert "1 pages, digest" in lines[0]
        address = re.search(r"http://127\.0\.0\.1:\d+", lines[1])
        assert address is not None
        assert post(f"{address[0]}/access", urls=["d.org/fiji.html"])["result"][0]["title"] == "Fiji"
        server.send_signal(signal.SIGINT)
        assert server.wait(30.0) in (0, 130)
    finally:
        server.kill()
        server.wait(30.0)
        server.stdout.close()
