"""One real server for two agents: the example with adapters, as a run starts it and as its workers ask it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mgrpo.config import RunConfig, dump_config, load_config
from mgrpo.config.policy import PolicyConfig
from mgrpo.engines.base import Engine, Generation, SamplingParams
from mgrpo.engines.registry import open_engine
from mgrpo.model import lora
from mgrpo.model.policy import Policy, load_policy, state_of
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

    def adapter(self, role: str, version: int) -> Policy:
        """What the role's trainer might have made of it by that version: far enough away to be told apart."""
        policy = load_policy(MODEL, PolicyConfig(lora=self.config.agents[role].policy.lora))
        noise = torch.Generator().manual_seed(10 * version + ROLES.index(role))
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if ".lora_B." in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.02)
        return policy

    async def load(self, role: str, version: int, policy: Policy) -> None:
        state = {n: t.detach().contiguous() for n, t in lora.adapter_of(policy.model.state_dict()).items()}
        label = version_label(role, 1, version)
        await self.engines[role].load(
            Weights.of_bytes(label, version, safetensors.torch.save(state)), version
        )

    async def ask(self, role: str, asked: list[list[int]]) -> list[Generation]:
        engine = self.engines[role]
        return await asyncio.gather(*(engine.generate(p, SAMPLED, seed=i) for i, p in enumerate(asked)))


@contextlib.contextmanager
def team(folder: Path) -> Iterator[Team]:
    made = Team(folder)
    try:
        with made.children, made.run.sockets(made.config):
            yield made
    finally:
        for engine in made.engines.values():
            made.loop.run_until_complete(engine.close())
        made.loop.close()


def merged(policy: Policy) -> Policy:
    """The plain model with the adapter's weights in it."""
    plain, state = reference(), state_of(policy.model)
    with torch.no_grad():
        for name, tensor in state_of(plain.model).items():
            tensor.copy_(state[name])
    return plain


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
    log-prob is that of the role's merged weights of that version, in float32 to 1e-4 on average, and no other's."""
    torch.set_num_threads(2)
    with team(tmp_path) as live:
        asked = prompts(reference())[:3]
        policies = {(role, version): live.adapter(role, version) for role in ROLES for version in (1, 2)}

        async def play() -> dict[tuple[str, int], list[Generation]]:
            for role in ROLES:
                await live.load(role, 1, policies[role, 1])
            both = asyncio.gather(*(live.ask(role, asked) for role in ROLES))
            await asyncio.sleep(0)
            await live.load("sub", 2, policies["sub", 2])
            main, sub = await both
            return {("main", 1): main, ("sub", 1): sub, ("sub", 2): await live.ask("sub", asked)}

        outs = live.loop.run_until_complete(asyncio.wait_for(play(), START_SECONDS))
    for (role, version), of_it in outs.items():
        assert {int(v) for out in of_it for v in out.versions} == {version}
        own = gaps(merged(policies[role, version]), asked, of_it)
        others = {
            other: float(gaps(merged(policy), asked, of_it).mean())
            for other, policy in policies.items()
            if other != (role, version)
        }
        print(
            f"{role} v{version}: |difference| mean {own.mean():.1e} max {own.max():.1e}; to others {others}"
        )
        assert own.mean() < 1e-4
        assert min(others.values()) > 1e-2


def test_the_example_runs_on_one_server(tmp_path: Path) -> None:
    """One step of the example: one server, both agents sampled by their own adapters of the step's version, as each
    trainer's own log-probs say, and nothing is left."""
    out = tmp_path / "run"
    short = (
        *("trainer.steps=1", "trainer.questions=1", "trainer.group_size=4", "trainer.old_logprobs=recompute"),
        *("eval.validation=1", "eval.heldout=1", "eval.start_validation=1"),
    )
    output = train(EXAMPLE, out, *SETS, *short, timeout=850)
    assert summary(out)["finished"], output
    started = sorted(path.name for path in (out / "logs").iterdir() if path.name.startswith("engine-"))
    assert [name.partition(".")[0] for name in started] == ["engine-main-0"]
    rows = [row for row in records(out) if "main/reward/mean" in row]
    assert [row["step"] for row in rows] == [1]
    print(json.dumps({name: value for name, value in rows[0].items() if "mismatch" in name}))
    assert 0 < rows[0]["main/policy/mismatch_kl"] < 1e-2
    assert leftovers(out) == [] and not (out / "weights").exists()
