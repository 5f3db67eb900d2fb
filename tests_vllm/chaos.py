"""kill -9 of a real vLLM server in the middle of an update, and of requests that run: no token carries a version that
did not sample it.

    python -m tests_vllm.chaos [--kills N]

A server of SmolLM2 in float32 takes patches in place. Each round a version is brought while a request is answered, and
the server is killed at a random moment of that. The pool starts it again (as the launcher does), which brings the
newest version whole, and the request is answered anew. Every token's log-prob is computed again from the version that
it carries, and from the other one of the two. Prints one JSON line; exits 1 when a token is mislabelled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.model.policy import Policy
from tests_vllm.kit import Served, below, logprobs, prompts, reference, served
from tests_vllm.steps import Steps

REQUEST_SECONDS = 30.0  # a front end whose engine was killed waits for its requests before it ends
WITHIN = 1e-3  # nats, at most: float32 in two orders of summation


def gaps(policies: dict[int, Policy], prompt: list[int], out: Generation) -> tuple[float, float]:
    """(largest gap of a token to the version that it carries, largest to the other one), nats."""
    own, other = 0.0, 0.0
    for version, policy in policies.items():
        chosen, _ = logprobs(policy, prompt, out, 1.0)
        gap = (chosen - torch.from_numpy(out.logprobs)).abs()
        mine = torch.from_numpy(out.versions == version)
        own = max(own, _largest(gap[mine]))
        other = max(other, _largest(gap[~mine]))
    return own, other


def _largest(values: torch.Tensor) -> float:
    return float(values.max()) if len(values) else 0.0


async def round_of(
    live: Served, steps: Steps, prompt: list[int], rng: random.Random
) -> tuple[Generation, bool]:
    """One update with a kill in it; what the request was answered, and whether the update was under way."""
    weights = steps.patch()
    live.version = weights.version
    family = below(live.children.pids()["engine-main-0"])
    request = asyncio.ensure_future(live.engine.generate(prompt, SamplingParams(40), seed=steps.version))
    await asyncio.sleep(0.5)
    load = asyncio.ensure_future(live.engine.load(weights, weights.version))
    await asyncio.sleep(rng.uniform(0.0, 1.5))
    under_way = not load.done()
    os.kill(rng.choice(family), signal.SIGKILL)
    await load
    return await request, under_way


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--kills", type=int, default=20)
    wanted, began, rng = arguments.parse_args().kills, time.monotonic(), random.Random(1)
    torch.set_num_threads(1)
    steps, before = Steps(reference()), reference()
    figures = {"kills": 0, "in_transfer": 0, "tokens": 0, "mislabelled": 0}
    largest, least = 0.0, float("inf")
    with (
        tempfile.TemporaryDirectory() as folder,
        served(Path(folder), "patch", "float32", timeout=REQUEST_SECONDS) as live,
    ):
        live.children._children[
            "engine-main-0"
        ].healthy = 1.0  # it is ended from outside, as often as we like
        prompt = prompts(steps.policy)[0]
        live.take(steps.whole())
        for number in range(wanted):
            before.model.load_state_dict(steps.policy.model.state_dict())
            policies = {steps.version: before, steps.version + 1: steps.policy}
            out, under_way = live.do(round_of(live, steps, prompt, rng))
            (after,) = live.generate([prompt], SamplingParams(20))
            for answer in (out, after):
                own, other = gaps(policies, prompt, answer)
                largest, least = max(largest, own), min(least, other)
                strange = set(answer.versions.tolist()) - set(policies)
                figures["mislabelled"] += int(own > WITHIN or bool(strange))
                figures["tokens"] += len(answer.token_ids)
            figures["mislabelled"] += int(set(after.versions.tolist()) != {steps.version})
            figures["kills"] += 1
            figures["in_transfer"] += int(under_way)
            print(
                f"{number + 1} of {wanted}: {figures}, largest gap {largest:.1e}", file=sys.stderr, flush=True
            )
    held = figures["mislabelled"] == 0
    seconds = round(time.monotonic() - began)
    print(
        json.dumps({"form": "server", "held": held, **figures, "gap": largest, "other": least, "s": seconds})
    )
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
