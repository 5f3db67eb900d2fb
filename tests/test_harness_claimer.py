"""`mgrpo gateway`: plays what it claims, tells failures apart, ends with the run or its rollout."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgrpo.errors import ConfigError, DeadlineError
from mgrpo.gateway.claimer import Claimer
from mgrpo.gateway.command import Command
from mgrpo.pipeline.play import RolloutResult
from tests.harness_kit import Engine, program, rollout_of
from tests.runs import started
from tests.test_harness_remote import KEY, worker

TEAM = """
ask("main", question["text"])
print("Nukualofa" if os.environ.get("MGRPO_TEST_HARNESS_KEY") is None else "it has the key")
"""


def claimer(file: Path, said: list[str], key: str | None = None, **options: Any) -> Claimer:
    command = Command((sys.executable, "-S", str(file)))
    return Claimer(
        command, key, **{"concurrency": 2, "patience": 30.0, "say": said.append, "after": 0.1} | options
    )


def played_by(
    claims: Callable[[], Claimer], n: int = 4, engine: Engine | None = None, **options: Any
) -> list[RolloutResult]:
    """n rollouts, and a claimer that ends when the worker does."""

    async def main() -> list[RolloutResult]:
        async with worker(engine, **options) as (made, url):
            playing = asyncio.create_task(claims().play([url]))
            made.play(n)
            try:
                results = await made.results()
                await made.task.close()
                await asyncio.wait_for(playing, 60)
            finally:
                playing.cancel()
                await asyncio.gather(playing, return_exceptions=True)
            return results

    return asyncio.run(main())


def test_the_claimer_plays_until_the_run_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands do not see the harness key; it says what became of each rollout."""
    monkeypatch.setenv(KEY, "open sesame")
    said: list[str] = []
    file = program(tmp_path, TEAM)
    results = played_by(lambda: claimer(file, said, "open sesame"), key_env=KEY)
    assert [rollout_of(result).correct for result in results] == [1.0] * 4
    assert sum("fiji-2: answered after" in line for line in said) == 4 and "the run is over" in said[-1]


def test_the_claimer_tells_failures_apart(tmp_path: Path) -> None:
    """A command that fails fails its rollout; one that asks for another try gets it."""
    said: list[str] = []
    failing = played_by(lambda: claimer(program(tmp_path, 'sys.exit("broken")'), said), 1)
    assert failing[0].kind == "task" and "ended with status 1: broken" in failing[0].failure
    once = f"""
if not os.path.exists({str(tmp_path / "tried")!r}):
    open({str(tmp_path / "tried")!r}, "w").close()
    sys.exit(75)
"""
    again = played_by(lambda: claimer(program(tmp_path, once + TEAM), said), 1)
    assert again[0].attempt == 1 and rollout_of(again[0]).correct == 1.0


def test_an_answer_that_the_gateway_has_no_room_for_fails_its_rollout(tmp_path: Path) -> None:
    """At once and by name; it is not taken for a program that fell silent."""
    file = program(tmp_path, 'ask("main", "x")\nsys.stdout.buffer.write(bytes([1]) * 900_000)')
    (failed,) = played_by(lambda: claimer(file, []), 1)
    assert failed.kind == "task" and "has no room for the command's answer" in failed.failure


def test_the_claimer_ends_a_command_whose_rollout_is_over(tmp_path: Path) -> None:
    """The deadline has passed: its place is free for the next."""
    said: list[str] = []
    file = program(tmp_path, 'ask("main", "x")\nsys.stdin.close()\nimport signal\nsignal.pause()')

    async def main() -> None:
        async with worker() as (made, url):
            playing = asyncio.create_task(claimer(file, said, concurrency=1, beats=600.0).play([url]))
            made.play(1, deadline=1.5)
            (result,) = await made.results()
            assert result.kind == "deadline"
            while not any("was over before it had ended" in line for line in said):
                await asyncio.sleep(0.01)
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)

    asyncio.run(main())


def test_a_claimer_that_is_stopped_gives_its_rollouts_back(tmp_path: Path) -> None:
    """Another one plays them."""
    said: list[str] = []
    hanging = tmp_path / "hanging"
    hanging.mkdir()
    slow = program(hanging, f"open({str(tmp_path / 'begun')!r}, 'w').close()\nimport signal\nsignal.pause()")
    quick = program(tmp_path, TEAM)

    async def main() -> None:
        async with worker() as (made, url):
            playing = asyncio.create_task(claimer(slow, said).play([url]))
            made.play(1)
            while not (tmp_path / "begun").exists():
                await asyncio.sleep(0.01)
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)
            playing = asyncio.create_task(claimer(quick, said).play([url]))
            (result,) = await made.results()
            assert result.attempt == 1 and rollout_of(result).correct == 1.0
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)

    asyncio.run(main())


def test_the_claimer_names_what_it_cannot_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong key, a server that is no such gateway, nobody at all."""
    monkeypatch.setenv(KEY, "open sesame")
    file, said = program(tmp_path, TEAM), list[str]()

    async def main(key: str | None, where: str = "") -> None:
        async with worker(key_env=KEY) as (_, url):
            await claimer(file, said, key, patience=0.2).play([where or url])

    with pytest.raises(ConfigError, match="refuses the harness key"):
        asyncio.run(main("wrong"))
    with pytest.raises(DeadlineError, match=r"http://127.0.0.1:9 has answered no claim for 0.2 s"):
        asyncio.run(main(None, "http://127.0.0.1:9"))


def test_the_claimer_names_a_server_that_is_no_gateway(tmp_path: Path) -> None:
    """Which has a page for everything."""

    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\nconnection: close\r\n\r\n<p>Hi</p>")
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(page, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await claimer(program(tmp_path, TEAM), []).play([f"http://127.0.0.1:{port}"])

    with pytest.raises(ConfigError, match="is no gateway: its answer is no JSON object"):
        asyncio.run(main())


def test_the_command_line(tmp_path: Path) -> None:
    """`mgrpo gateway` plays a rollout, refuses what it cannot start, and SIGTERM ends it."""
    file = program(tmp_path, TEAM)

    async def main() -> None:
        async with worker() as (made, url):
            made.play(1)
            words = [
                sys.executable,
                "-m",
                "mgrpo",
                "gateway",
                url,
                "--command",
                f"{sys.executable} -S {file}",
            ]
            with started(words) as process:
                (result,) = await made.results()
                assert rollout_of(result).correct == 1.0
                process.terminate()
                output = await asyncio.to_thread(process.communicate, timeout=60)
                assert process.returncode == 130, output

    asyncio.run(main())
    for words, expected in (
        (["http://127.0.0.1:9", "--command", "no-such-program x"], "there is no such program"),
        (["127.0.0.1:9", "--command", "true"], "expected the address of a gateway"),
    ):
        with started([sys.executable, "-m", "mgrpo", "gateway", *words]) as process:
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 2 and expected in output
