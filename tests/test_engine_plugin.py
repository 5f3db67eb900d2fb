"""An engine of another package: found by its path or by the name that the package gives it, and used by a whole run."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from mgrpo import plugins
from mgrpo.config import load_config, view_of
from mgrpo.engines.registry import GROUP, find_engine
from mgrpo.errors import ConfigError
from tests.runs import RELAY, final_weights, leftovers, summary, train

PLUGIN = '''
"""A team's own engine; here one that writes down what it was asked and lets another sample."""

from pathlib import Path

from mgrpo.engines.backend import EngineBackend
from mgrpo.engines.base import Engine
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.errors import ConfigError
from mgrpo.model.policy_files import policy_from_files


class Logged(Engine):
    def __init__(self, inner, log):
        self.inner, self.log = inner, log

    @property
    def version(self):
        return self.inner.version

    async def generate(self, prompt_ids, params, *, seed, session=None):
        with self.log.open("a") as file:
            print("generate", file=file)
        return await self.inner.generate(prompt_ids, params, seed=seed, session=session)

    async def load(self, path_or_state, version):
        with self.log.open("a") as file:
            print("load", version, file=file)
        await self.inner.load(path_or_state, version)

    def release(self, session):
        self.inner.release(session)

    async def close(self):
        await self.inner.close()


class Backend(EngineBackend):
    @classmethod
    def open(cls, view, files, addresses, on_event):
        policy = policy_from_files(files, view.role)
        engine = HfEngine(policy, slots=view.rollout.slots, max_length=view.agent.max_length)
        return Logged(engine, Path(view.owner.engine.options["log"])), policy.tokenizer

    @classmethod
    def check(cls, view):
        if "log" not in view.agent.engine.options:
            raise ConfigError(f"agents.{view.role}.engine.options.log is missing")
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module that is nowhere but on the path of this test and of what it starts."""
    (tmp_path / "own_engine.py").write_text(PLUGIN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_engine", raising=False)
    return "own_engine"


def test_an_engine_from_outside_serves_a_run(plugin: str, tmp_path: Path) -> None:
    """Three steps with it, whose weights are those of the same steps with the engine that it hands its requests to: a
    run depends on the interface of engines and on nothing else of theirs."""
    steps = ("trainer.steps=3", "record.enabled=false", "eval.heldout=1")
    log, out = tmp_path / "log", tmp_path / "own"
    train(RELAY, out, *steps, f'agents.left.engine={{type="{plugin}:Backend", options={{log="{log}"}}}}')
    train(RELAY, tmp_path / "hf", *steps)
    assert summary(out)["finished"] and leftovers(out) == []
    assert final_weights(out) == final_weights(tmp_path / "hf")
    lines = log.read_text().splitlines()
    assert {"load 0", "load 1", "load 2", "generate"} <= set(lines)


def test_an_installed_engine_has_a_name(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point in the group of engines is a type, and is offered where another name is not known."""
    point = EntryPoint("own", f"{plugin}:Backend", GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == GROUP else [])
    config = load_config(RELAY, ['agents.left.engine={type="own", options={log="x"}}'])
    assert find_engine(view_of(config, "left")).__name__ == "Backend"
    other = load_config(RELAY, ["agents.left.engine.type=owm"])
    with pytest.raises(ConfigError, match="'owm' is unknown, expected hf, own, sglang, vllm or"):
        find_engine(view_of(other, "left"))
