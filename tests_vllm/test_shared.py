"""One real server for two agents: the example with adapters, as a run starts it and as its workers ask it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from mgrpo.config import RunConfig, dump_config, load_config
from mgrpo.config.policy import LoraConfig
from mgrpo.engines.base import Engine, Generation, SamplingParams
from mgrpo.engines.registry import open_engine
from mgrpo.model.loading import load_policy
from mgrpo.model.policy import Policy
from mgrpo.model.policy_files import policy_files
from mgrpo.run.folder import RunFolder, started_engines
from mgrpo.run.supervisor import Supervisor
from mgrpo.types import version_label
from mgrpo.weights.version import Weights
from tests.runs import leftovers, records, summary, train
from tests_vllm.kit import MODEL, ROOT, START_SECONDS, logprobs, prompts, reference

pytestmark = pytest.mark.timeout(900)
EXAMPLE = ROOT / "examples/smollm2/smollm2-shared.toml"
ROLES = ("main", "sub")
SETS = (
    *(f"agents.{role}.model={MODEL}" for role in ROLES),
    f"agents.main.engine.python={ROOT}/.venv-vllm/bin/python",
    f"agents.main.engine.timeout={START_SECONDS}",
)
ZEROS = (0, 3)  # versions of adapters that are the base model
SAMPLED = SamplingParams(max_tokens=24, temperature=0.7)


class Team:
    """The example's engines on the server that its config has started, with an event loop of their own."""

    def __init__(self, folder: Path) -> None:
        self.config: RunConfig = load_config(EXAMPLE, [*SETS, "agents.main.engine.dtype=float32"])
        dump_config(self.config, folder / "config.json")
        self.run, self.loop = RunFolder(folder / "run"), asyncio.new_event_loop()
        self.children = Supervisor(self.run.logs)
        ((role, replica),) = started_engines(self.config)
        which = ["--agent", role, "--replica", str(replica), "--out", str(self.run.root)]
        self.children.start("engine", ["engine", str(folder / "config.json"), *which], healthy=START_SECONDS)
        files, addresses = policy_files(load_policy(MODEL)), self.run.addresses(self.config)
        self.engines: dict[str, Engine] = {
            role: open_engine(self.config, role, files, addresses, print)[0] for role in ROLES
        }

    async def load(self, role: str, version: int) -> None:
        state = adapter(self.config.agents[role].policy.lora, role, version)
        label = version_label(role, 1, version)
        await self.engines[role].load(
            Weights.of_bytes(label, version, safetensors.torch.save(state)), version
        )

    async def ask_one_by_one(self, role: str, asked: list[list[int]]) -> list[Generation]:
        """Each in a batch of its own: to the last bit a matter of weights, prompt and seed."""
        return [await self.engines[role].generate(prompt, SAMPLED, seed=1) for prompt in asked]

    async def ask(self, role: str, asked: list[list[int]]) -> list[Generation]:
        engine = self.engines[role]
        return await asyncio.gather(*(engine.generate(p, SAMPLED, seed=i) for i, p in enumerate(asked)))


@contextlib.contextmanager
def team(folder: Path) -> Iterator[Team]:
    made = Team(folder)
    with made.children, made.run.sockets(made.config):
        try:
            yield made
        finally:
            for engine in made.engines.values():
                made.loop.run_until_complete(engine.close())
            made.loop.close()


def adapter(config: LoraConfig, role: str, version: int) -> dict[str, Tensor]:
    """What the role's trainer might have made of it by that version, as it publishes it: far enough away from the base
    to be told apart, but for the versions that change nothing."""
    noise = torch.Generator().manual_seed(10 * version + ROLES.index(role))
    with safe_open(MODEL / "model.safetensors", "pt") as base:
        shapes = {name: base.get_slice(name).get_shape() for name in base.keys()}  # noqa: SIM118 - no mapping
    state = {}
    for name, (out, into) in ((n, s) for n, s in shapes.items() if n.split(".")[-2] in config.targets):
        layer = name.removesuffix(".weight")
        state[f"{layer}.lora_A.default.weight"] = torch.randn(config.rank, into, generator=noise) * into**-0.5
        scale = 0.0 if version in ZEROS else 0.02
        state[f"{layer}.lora_B.default.weight"] = torch.randn(out, config.rank, generator=noise) * scale
    return state


@contextlib.contextmanager
def merged(plain: Policy, config: LoraConfig, role: str, version: int) -> Iterator[None]:
    """Inside the block the plain model has the adapter's weights in it."""
    state, kept = adapter(config, role, version), {}
    with torch.no_grad():
        for name, a in state.items():
            if ".lora_A." in name:
                weight = plain.model.get_parameter(name.replace("lora_A.default.", ""))
                kept[weight] = weight.clone()
                weight.add_(config.alpha / config.rank * (state[name.replace("lora_A", "lora_B")] @ a))
        yield
        for weight, before in kept.items():
            weight.copy_(before)


def gaps(policy: Policy, asked: list[list[int]], outs: list[Generation]) -> Tensor:
    """|difference| of the reported log-probs to those of our own forward, all tokens."""
    return torch.cat(
        [
            (torch.from_numpy(out.logprobs) - logprobs(policy, prompt, out, SAMPLED.temperature)[0]).abs()
            for prompt, out in zip(asked, outs, strict=True)
        ]
    )


def test_every_token_is_of_its_own_roles_adapter(tmp_path: Path) -> None:
    """Both agents ask at once, and one of them is updated while they do: each token carries its role's version, and its
    log-prob is that of the role's merged weights of that version, in float32 to 1e-4 on average, and no other's. An
    adapter of zeros is the base model, before the others and, bit for bit, after them."""
    plain = reference()
    asked = prompts(plain)[:3]
    with team(tmp_path) as live:

        async def play() -> dict[tuple[str, int], list[Generation]]:
            await live.load("main", 0)
            zeros = await live.ask_one_by_one("main", asked)
            for role in ROLES:
                await live.load(role, 1)
            both = asyncio.gather(*(live.ask(role, asked) for role in ROLES))
            await asyncio.sleep(0)
            await live.load("sub", 2)
            main, sub = await both
            outs = {("main", 0): zeros, ("main", 1): main, ("sub", 1): sub}
            outs["sub", 2] = await live.ask("sub", asked)
            await live.load("main", 3)
            return outs | {("main", 3): await live.ask_one_by_one("main", asked)}

        outs = live.loop.run_until_complete(asyncio.wait_for(play(), START_SECONDS))
        config = live.config.agents["main"].policy.lora
    before, after = outs["main", 0], outs.pop(("main", 3))
    assert {int(v) for out in after for v in out.versions} == {3}
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
    found: dict[tuple[str, int], dict[tuple[str, int], Tensor]] = {of: {} for of in outs}
    for weights in (*outs, ("main", 2)):
        with merged(plain, config, *weights):
            for of, made in outs.items():
                found[of][weights] = gaps(plain, asked, made)
    for (role, version), gap in found.items():
        assert {int(v) for out in outs[role, version] for v in out.versions} == {version}
        own = gap.pop((role, version))
        others = {f"{r} v{v}": round(float(g.mean()), 3) for (r, v), g in gap.items()}
        print(
            f"{role} v{version}: |difference| mean {own.mean():.1e} max {own.max():.1e} nats; to others {others}"
        )
        assert own.mean() < 1e-4
        assert min(others.values()) > 1e-2


def test_the_example_runs_on_one_server(tmp_path: Path) -> None:
    """Two steps of the example: one server, both agents sampled by their own adapters of the step's version, as each
    trainer's own log-probs say, and nothing is left."""
    out = tmp_path / "run"
    short = (
        *("trainer.steps=2", "trainer.questions=2", "trainer.group_size=4", "trainer.old_logprobs=recompute"),
        *("eval.validation=1", "eval.heldout=1", "eval.start_validation=0"),
    )
    output = train(EXAMPLE, out, *SETS, *short, timeout=850)
    assert summary(out)["finished"], output
    started = {path.name.partition(".")[0] for path in (out / "logs").iterdir()}
    assert {name for name in started if name.startswith("engine-")} == {"engine-main-0"}
    rows = [row for row in records(out) if "main/reward/mean" in row or "sub/reward/mean" in row]
    assert {row["step"] for row in rows if "main/reward/mean" in row} == {1, 2}
    compared = 0
    for row in rows:
        for role in ROLES:
            if f"{role}/reward/mean" in row:
                kl = row.get(f"{role}/policy/mismatch_kl")
                if kl is None:  # nothing to learn from, so no token was computed again
                    assert row[f"{role}/advantage/frac_zero"] == 1
                    continue
                compared += 1
                print(f"step {row['step']}, {role}: mismatch KL {kl:.1e}")
                assert row[f"{role}/staleness/max"] == 0 and 0 <= kl < 1e-2
    assert compared and any("sub/reward/mean" in row for row in rows), output
    assert leftovers(out) == [] and not (out / "weights").exists()
