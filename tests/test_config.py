"""Config: every mistake is one line that names the field or the file and what was expected."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mgrpo.config import config_digest, dump_config, load_config
from mgrpo.errors import ConfigError

ROOT = Path(__file__).parent.parent
ATLAS = ROOT / "examples" / "atlas" / "atlas.toml"


def test_the_example_loads_and_survives_its_own_copy(tmp_path: Path) -> None:
    """What a run keeps of its config is the config."""
    config = load_config(ATLAS)
    dump_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    assert config.roles == ("main", "sub") and config.sub_roles == ("sub",)


def test_overrides_are_toml_values() -> None:
    """Numbers, strings and lists arrive as such; a bare word is a string."""
    config = load_config(
        ATLAS,
        [
            "trainer.steps=7",
            "seed=3",
            "agents.sub.alignment.mode=expected",
            "agents.sub.optimizer.betas=[0.5, 0.6]",
        ],
    )
    assert (config.trainer.steps, config.seed) == (7, 3)
    assert config.agents["sub"].alignment.mode == "expected"
    assert config.agents["sub"].optimizer.betas == (0.5, 0.6)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.stepz=3", "trainer.stepz: unknown key"),
        ("trainer.steps=many", "trainer.steps: Input should be a valid integer, got 'many'"),
        ("trainer.steps=0", "trainer.steps: Input should be greater than or equal to 1, got 0"),
        ("trainer.steps=1.5", "trainer.steps: Input should be a valid integer"),
        ("trainer.minibatches=3", "questions=16 is not a multiple of minibatches=3"),
        ("agents.sub.alignment.mode=best", "agents.sub.alignment.mode"),
        ("agents.sub.alignment.vote=per_invocation", 'needs mode "none"'),
        ("agents.sub.reward.correct=1", "agents.sub.reward.correct has no meaning for role 'sub'"),
        ("agents.main.reward.outcome=1", "whose part of the rollout's outcome is called 'correct'"),
        ("agents.main.reward.citation=0.2", None),
        (
            "agents.sub.reward.expert=-0.1",
            "agents.sub.reward.expert: Input should be greater than or equal to 0",
        ),
        (
            "agents.sub.reward.expert=inf",
            "agents.sub.reward.expert: Input should be a finite number, got inf",
        ),
        (
            "agents.sub.reward.expert=true",
            "agents.sub.reward.expert: Input should be a valid number, got True",
        ),
        ("agents.sub.reward.gate=0.5", "agents.sub.reward.gate: Input should be a valid boolean, got 0.5"),
        ("agents.sub.reward.mean=0.5", "mean is a metric of the reward itself"),
        ("agents.sub.reward={'a b' = 1}", "'a b' is no name of a score"),
        ("agents.sub.reward={format = 0}", "agents.sub.reward has no part with a weight above 0"),
        ("agents.main.d_max=2", "agents.main.d_max must be 1"),
        ("agents.main.model=/x", "agents.main has both model and warm_start.steps"),
        ("agents.main.max_length=99999", "exceeds trainer.micro_batch"),
        ("agents.main.optimizer.betas=[0.9, 1.0]", "betas must lie in [0, 1)"),
        ("agents.main.optimizer.lr=nan", "agents.main.optimizer.lr"),
        ("agents.other.frozen=true", "agents.other.reward: required, but missing"),
        ("store.url=tcp://1.2.3.4:5", None),
        ("nonsense", "override 'nonsense': expected section.field=value"),
        ("seed.deep=1", "override 'seed.deep=1': seed is not a section"),
    ],
)
def test_a_bad_setting_is_named(override: str, expected: str | None) -> None:
    """The message is one line with the file, the field and the bound; a legal setting raises nothing."""
    if expected is None:
        load_config(ATLAS, [override])
        return
    with pytest.raises(ConfigError) as error:
        load_config(ATLAS, [override])
    assert expected in str(error.value)
    assert "atlas.toml" in str(error.value) or str(error.value).startswith("override")
    assert "\n" not in str(error.value)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    """Missing, binary, broken and empty files each say what is wrong with them."""
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot read"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.toml: not a text file"):
        load_config(tmp_path / "binary.toml")
    (tmp_path / "broken.toml").write_text("seed = = 1")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid toml"):
        load_config(tmp_path / "broken.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ConfigError, match="agents: required, but missing"):
        load_config(tmp_path / "empty.toml")


def test_all_frozen_or_one_agent_is_no_run() -> None:
    """A run trains something, and has a team."""
    with pytest.raises(ConfigError, match="every agent is frozen"):
        load_config(ATLAS, ["agents.main.frozen=true", "agents.sub.frozen=true"])


def test_digest_tells_computations_apart_not_places() -> None:
    """Addresses, threads and length do not change what is computed; a seed or a reward weight does."""
    base = config_digest(load_config(ATLAS))
    same = [
        "store.url=tcp://127.0.0.1:5600",
        "agents.main.url=tcp://127.0.0.1:5601",
        "agents.sub.url=tcp://127.0.0.1:5602",
    ]
    assert config_digest(load_config(ATLAS, [*same, "trainer.steps=9", "rollout.threads=1"])) == base
    assert config_digest(load_config(ATLAS, ["seed=2"])) != base
    assert config_digest(load_config(ATLAS, ["agents.sub.reward.expert=0.3"])) != base


def test_the_reference_is_current() -> None:
    """docs/config.md is what the docstrings say today, and no field lacks one."""
    docs = ROOT / "docs"
    spec = importlib.util.spec_from_file_location("make_config", docs / "make_config.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (docs / "config.md").read_text() == module.render(), "run python docs/make_config.py"
    empty = [line for line in module.render().splitlines() if line.endswith("|  |")]
    assert not empty, empty


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["agents.sub.shares=nobody"], "expected a role with a policy of its own"),
        (["agents.sub.shares=sub"], "expected a role with a policy of its own"),
        (["agents.sub.shares=main"], "agents.sub.warm_start has no effect"),
        (
            ["agents.sub.shares=main", "agents.sub.warm_start={}", "agents.sub.frozen=true"],
            "frozen has no effect",
        ),
        (
            ["agents.sub.shares=main", "agents.sub.warm_start={}", "agents.sub.optimizer.lr=0.1"],
            "optimizer differs",
        ),
        (
            ["agents.sub.shares=main", "agents.sub.warm_start={}", "agents.main.frozen=true"],
            "nothing would be trained",
        ),
    ],
)
def test_a_shared_policy_is_described_once(overrides: list[str], message: str) -> None:
    """What the role with the policy says is not said again, let alone differently, by the role that shares it."""
    with pytest.raises(ConfigError, match=message):
        load_config(ATLAS, overrides)
