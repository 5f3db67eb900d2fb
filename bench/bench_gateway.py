"""What a turn through the gateway costs beside its sampling: CPU time of the thread that serves and plays.

    python -m bench.bench_gateway [--quick] [--json PATH]

Programs are client processes over loopback, so their own time is not counted; the engine says the same few tokens at
once. "a turn at 32k" sends the whole history each time, as programs do, and counts the turns that do so; the rate is of
64 rollouts at the same time, ten turns each. Where mgrpo.gateway.rollout is not there yet, a rollout without
conversations stands in, and the figures say so.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.common import Report, parser
from mgrpo.engines.base import Engine, Generation, SamplingParams
from mgrpo.environments.episode import Agent, Episode
from mgrpo.gateway.forms import Forms
from mgrpo.gateway.options import GatewayOptions
from mgrpo.gateway.rollout import GatewayRollout
from mgrpo.gateway.server import Gateway
from tests.chat_templates import QWEN3, Family

HISTORIES = {"2k": 2_000, "32k": 32_000}
LONGEST = 48_000
ROLLOUTS, TURNS = 64, 10
WORDS = "The capital of Fiji is Suva and the user says so. "


class Parrot(Engine):
    """Says 24 tokens and the end of the turn, at once."""

    def __init__(self, tokenizer: Any, end: str) -> None:
        ids = [
            *tokenizer.encode(WORDS * 9, add_special_tokens=False)[:24],
            tokenizer.convert_tokens_to_ids(end),
        ]
        self.ids = np.asarray(ids, np.int32)

    @property
    def version(self) -> int:
        return 0

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int, session: str | None = None
    ) -> Generation:
        n = len(self.ids)
        return Generation(self.ids, np.zeros(n, np.float32), np.zeros(n, np.int32), "stop")

    async def load(self, path_or_state: object, version: int) -> None:
        raise NotImplementedError


def rollouts(n: int, options: GatewayOptions) -> list[GatewayRollout]:
    family: Family = QWEN3
    tokenizer = family.tokenizer()
    agent = Agent("main", Parrot(tokenizer, "<|im_end|>"), tokenizer, 1.0, LONGEST)
    forms = Forms(options)
    return [GatewayRollout(Episode(f"q{i}", 0, {"main": agent}, seed=i), options, forms) for i in range(n)]


# -- client process --


async def post(address: str, token: str, body: dict[str, Any], stream: tuple[Any, Any]) -> dict[str, Any]:
    """One turn over a kept connection."""
    reader, writer = stream
    data = json.dumps(body).encode()
    path = address.split("/", 3)[3]
    head = f"POST /{path}/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    status = await reader.readline()
    length = 0
    while (line := await reader.readline()).strip():
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    answer = json.loads(await reader.readexactly(length))
    assert b" 200 " in status, answer
    return answer  # type: ignore[no-any-return]


async def talk(address: str, token: str, turns: int, said: Callable[[int], str], until: int = 0) -> None:
    """A conversation of `turns` turns; with `until`, of so many more behind a history of so many tokens."""
    port = int(address.split(":")[2].split("/")[0])
    stream = await asyncio.open_connection("127.0.0.1", port)
    messages: list[dict[str, Any]] = []
    used, left = 0, turns
    began = not until
    while left:
        if not began and used >= until:
            print("begin", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            began = True
        messages.append({"role": "user", "content": said(used) if began else WORDS * 40})
        answer = await post(address, token, {"model": "main", "messages": messages, "max_tokens": 32}, stream)
        messages.append(answer["choices"][0]["message"])
        used = answer["usage"]["total_tokens"]
        left -= began
    stream[1].close()


async def client(addresses: list[tuple[str, str]], turns: int, until: int) -> None:
    """Talk at all addresses at the same time."""
    if not until:
        print("begin", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
    await asyncio.gather(*(talk(a, t, turns, lambda used: "And then?", until) for a, t in addresses))
    print("end", flush=True)


# -- the process that is measured --


async def measured(n: int, turns: int, until: int) -> float:
    """CPU seconds of this thread a turn."""
    options = GatewayOptions(turns=4096)
    gateway = Gateway(options)
    await gateway.start()
    try:
        played = rollouts(n, options)
        addresses = [(gateway.open(rollout), rollout.token) for rollout in played]
        call = json.dumps([addresses, turns, until])
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.bench_gateway", "--part", call),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            async with asyncio.timeout(300.0):
                assert await process.stdout.readline() == b"begin\n", "the client failed"
                began = time.thread_time()
                process.stdin.write(b"\n")
                assert await process.stdout.readline() == b"end\n", "the client failed"
                spent = time.thread_time() - began
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
        for rollout in played:
            gateway.close_rollout(rollout)
        return spent / (n * turns)
    finally:
        await gateway.close()


def main() -> int:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--part", help="for the client processes of this bench")
    args = p.parse_args()
    if args.part:
        asyncio.run(client(*json.loads(args.part)))
        return 0
    report = Report("bench_gateway")
    note = "one thread, CPU time"
    turns = 5 if args.quick else 30
    for name, tokens in HISTORIES.items():
        took = 1e3 * asyncio.run(measured(1, turns, tokens))
        bound = 10.0 if name == "32k" else None
        report.figure(f"a turn at {name} tokens", took, "ms", at_most=bound, note=note)
    rate = 1.0 / asyncio.run(measured(ROLLOUTS, 3 if args.quick else TURNS, 0))
    report.figure(f"turns of one core, {ROLLOUTS} rollouts", rate, "/s", at_least=300, note=note)
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
