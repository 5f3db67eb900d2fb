"""SFT: its learning rate is the config's, else the task's, and atlas' falls with the width."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mgrpo.config import load_config
from mgrpo.config.run import SftConfig
from mgrpo.errors import ConfigError
from mgrpo.model.loading import load_policy
from mgrpo.pipeline import trainer_loop
from mgrpo.tasks.atlas.task import AtlasTask
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.sft import Sft, shares

ATLAS = Path(__file__).parent.parent / "examples" / "atlas" / "atlas.toml"


def test_a_step_is_as_long_as_the_learning_rate(tmp_path: Path) -> None:
    """The first update of Adam changes a weight by the rate, whatever the gradient."""
    task = AtlasTask({"width": 16})
    task.build_policy("main", 1, str(tmp_path / "p"))
    for lr in (1e-2, 1e-3):
        policy = load_policy(tmp_path / "p")
        before = [p.detach().clone() for p in policy.parameters()]
        config = SftConfig(steps=1, warmup_steps=0, decay=0.0)
        (share,) = shares(task.demo_batch("main", 0, 8, 1), 1)
        Sft(policy, config, lr, Ranks()).step(0, share)
        moved = max(
            float((p.detach() - b).abs().max()) for p, b in zip(policy.parameters(), before, strict=True)
        )
        assert moved == pytest.approx(lr, rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 4e-3),
        (["task.options.width=128"], 2e-3),
        (["agents.sub.sft.lr=5e-4", "task.options.width=128"], 5e-4),
    ],
)
def test_the_rate_is_the_tasks_where_the_config_leaves_it_open(overrides: list[str], expected: float) -> None:
    """A rate that is set means what it says; the task's own follows the width of its policies."""
    rates: list[float] = []

    def record(*arguments: Any) -> None:
        rates.append(arguments[4])

    config = load_config(ATLAS, overrides)
    feed: Any = SimpleNamespace(config=config, agent=config.agents["sub"], role="sub")  # SFT needs no sockets
    trainer: Any = SimpleNamespace(sft=record)
    trainer_loop.sft(feed, AtlasTask(config.task.options), trainer, Path(), Path())
    assert rates == [pytest.approx(expected)]


def test_a_rate_is_positive() -> None:
    """Unset is the task's; 0 would train nothing."""
    with pytest.raises(ConfigError, match=r"agents\.sub\.sft\.lr"):
        load_config(ATLAS, ["agents.sub.sft.lr=0"])
