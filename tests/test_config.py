"""Config: every mistake is one line that names the field or the file and what was expected."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from mgrpo.config import config_digest, dump_config, load_config, view_of
from mgrpo.config.run import TrainerConfig
from mgrpo.errors import ConfigError
from mgrpo.run.processes import check_plugins, run_params

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
        ("agents.sub.alignment.sequence_weight=per_invocation", 'needs mode "none"'),
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
        ("agents.sub.alignment.vote=per_invocation", "vote is unknown: it is called sequence_weight"),
        ("agents.sub.warm_start.steps=1", "warm_start is unknown: it is called sft"),
        ("eval.gate=5", "gate is unknown: it is called start_validation"),
        ("agents.main.model=/x", "agents.main has both model and sft.steps"),
        ("agents.main.max_length=99999", "exceeds trainer.micro_batch"),
        ("agents.main.optimizer.betas=[0.9, 1.0]", "betas must lie in [0, 1)"),
        (
            "agents.main.optimizer.lr=nan",
            "agents.main.optimizer.lr: Input should be a finite number, got nan",
        ),
        (
            "agents.main.optimizer.lr=inf",
            "agents.main.optimizer.lr: Input should be a finite number, got inf",
        ),
        (
            "agents.sub.optimizer.grad_clip=inf",
            "agents.sub.optimizer.grad_clip: Input should be a finite number",
        ),
        ("agents.main.optimizer.betas=[0.9, nan]", "agents.main.optimizer.betas.1: Input should be a finite"),
        ("agents.main.reward.format=-inf", "agents.main.reward.format: Input should be a finite number"),
        ("store.timeout=inf", "store.timeout: Input should be a finite number, got inf"),
        ("store.timeout=1e300", "store.timeout: Input should be less than or equal to 10000000, got 1e+300"),
        ("trainer.stop_timeout=nan", "trainer.stop_timeout: Input should be a finite number, got nan"),
        ("record.max_mb=inf", "record.max_mb: Input should be a finite number, got inf"),
        ("task.options.noise={a=[1.0, inf]}", "task.options: noise.a.1 should be a finite number, got inf"),
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
    (tmp_path / "latin.toml").write_bytes("# für mich\n".encode("latin-1"))
    with pytest.raises(
        ConfigError, match=r"latin\.toml: not a text file in UTF-8 .* at byte 3\); save it as"
    ):
        load_config(tmp_path / "latin.toml")
    (tmp_path / "broken.toml").write_text("seed = = 1")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid toml"):
        load_config(tmp_path / "broken.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ConfigError, match="agents: required, but missing"):
        load_config(tmp_path / "empty.toml")


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    """Editors put one before UTF-8: the config is the same, as TOML and as JSON, with the line ends of Windows too."""
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf" + ATLAS.read_bytes().replace(b"\n", b"\r\n"))
    config = load_config(tmp_path / "run.toml")
    assert config == load_config(ATLAS)
    (tmp_path / "run.json").write_text(config.model_dump_json(), encoding="utf-8-sig")
    assert load_config(tmp_path / "run.json") == config


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("utf-16", "byte order mark of UTF-16"),
        ("utf-32", "byte order mark of UTF-32"),
        ("utf-16-le", "byte 1 is zero, as in UTF-16"),
    ],
)
def test_another_encoding_is_named(tmp_path: Path, encoding: str, words: str) -> None:
    """What PowerShell's redirection writes: the encoding and what to save it as."""
    (tmp_path / "run.toml").write_bytes(ATLAS.read_text().encode(encoding))
    with pytest.raises(ConfigError, match=rf"run\.toml: not a text file in UTF-8.*{words}; save it as UTF-8"):
        load_config(tmp_path / "run.toml")


def test_all_frozen_is_no_run() -> None:
    """A run trains something."""
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
        (["agents.sub.shares=main"], "agents.sub.sft has no effect"),
        (
            ["agents.sub.shares=main", "agents.sub.sft={}", "agents.sub.frozen=true"],
            "frozen has no effect",
        ),
        (
            ["agents.sub.shares=main", "agents.sub.sft={}", "agents.sub.optimizer.lr=0.1"],
            "optimizer differs",
        ),
        (
            ["agents.sub.shares=main", "agents.sub.sft={}", "agents.main.frozen=true"],
            "nothing would be trained",
        ),
    ],
)
def test_a_shared_policy_is_described_once(overrides: list[str], message: str) -> None:
    """What the role with the policy says is not said again, let alone differently, by the role that shares it."""
    with pytest.raises(ConfigError, match=message):
        load_config(ATLAS, overrides)


def test_a_view_holds_ones_own_section_and_that_of_the_policy() -> None:
    """A role that shares a policy: its own length and temperature, the owner's engine and model, the longest of both
    for a server; the others see themselves."""
    config = load_config(
        ATLAS,
        ["agents.sub.shares=main", "agents.sub.sft={}", "agents.sub.max_length=200", "agents.main.max_length=90",
         "agents.main.policy.ranks=2", "agents.main.engine.dtype=bfloat16", "rollout.slots=7"],
    )  # fmt: skip
    sub, main = view_of(config, "sub"), view_of(config, "main")
    assert (sub.role, sub.owner_role, sub.agent.max_length, sub.owner.max_length) == ("sub", "main", 200, 90)
    assert sub.owner is config.agents["main"] and sub.owner.engine != sub.agent.engine
    assert main.agent is main.owner is sub.owner and main.owner_role == "main"
    assert (main.longest, sub.longest, main.ranks, sub.ranks, main.rollout.slots) == (200, 200, 2, 2, 7)
    assert main.idle_timeout == config.store.idle_timeout
    with pytest.raises(KeyError):
        view_of(config, "nobody")


def test_a_vllm_server_serves_one_policy_or_adapters() -> None:
    """Two roles that name one server: whole weights would overwrite each other's, adapters stand side by side."""

    def roles(main: str, sub: str, rank: int = 0) -> list[str]:
        return [
            f'agents.{role}.engine={{type="vllm", sync="{sync}", urls=["http://a:8000", "{url}"]}}'
            for role, sync, url in (("main", main, "http://b:8000"), ("sub", sub, "http://b:8000/"))
        ] + [f"agents.{role}.policy.lora.rank={rank}" for role in ("main", "sub")]

    for main, sub in (("fs", "fs"), ("fs", "lora"), ("lora", "fs")):
        with pytest.raises(
            ConfigError, match=r"agents\.sub\.engine\.urls.*http://a:8000 already serves.*'main'"
        ):
            load_config(ATLAS, roles(main, sub, rank=2))
    load_config(ATLAS, roles("lora", "lora", rank=2))


def test_the_stores_times_are_configuration_and_no_part_of_what_a_run_computes() -> None:
    """Positive and finite; the store is created with them."""
    config = load_config(ATLAS, ["store.group_timeout=7200", "store.lease=20"])
    params = run_params(config)
    assert (params.group_timeout_s, params.lease_s) == (7200.0, 20.0)
    assert config_digest(config) == config_digest(load_config(ATLAS))
    for wrong in ("0", "-1", "inf", "nan"):
        for name in ("group_timeout", "lease"):
            with pytest.raises(ConfigError, match=f"store.{name}"):
                load_config(ATLAS, [f"store.{name}={wrong}"])


@pytest.mark.parametrize(
    ("engine", "lag", "message"),
    [
        ('{on_update="recompute"}', 1, None),
        ('{on_update="recompute"}', 0, None),  # the default
        ('{on_update="keep"}', 0, "main.engine.on_update has no effect with trainer.max_lag=0"),
        ('{type="vllm", on_update="keep"}', 1, None),
        ('{type="vllm", on_update="keep"}', 0, "main.engine.on_update has no effect with trainer.max_lag=0"),
        (
            '{type="vllm", sync="lora", on_update="keep"}',
            1,
            'on_update=.keep. has no effect with sync "lora"',
        ),
        (
            '{type="sglang", urls=["http://a:1"], on_update="keep"}',
            1,
            "SGLang labels a whole answer with one",
        ),
        ('{on_update="drop"}', 1, "agents.main.engine.on_update: Input should be 'keep' or 'recompute'"),
    ],
)
def test_what_an_update_does_to_running_requests(engine: str, lag: int, message: str | None) -> None:
    """Each type of engine takes what it can do, and no setting that could not act."""
    overrides = [f"agents.main.engine={engine}", f"trainer.max_lag={lag}"]
    if message is None:
        assert load_config(ATLAS, overrides).trainer.max_lag == lag
        return
    with pytest.raises(ConfigError, match=message):
        load_config(ATLAS, overrides)


def test_advantages_of_tokens_need_ratios_of_tokens() -> None:
    """A per-token algorithm beside a loss whose ratio is the trajectory's is refused before anything starts."""
    relay = ROOT / "tests" / "relay.toml"
    tokens = 'agents.left.algorithm={type="turn_credit"}'
    check_plugins(load_config(relay, [tokens]))
    for loss in ('{type="gspo"}', '{ratio_level="sequence"}'):
        with pytest.raises(
            ConfigError, match=r"agents\.left: algorithm 'turn_credit' .*ratio_level = \"token\""
        ):
            check_plugins(load_config(relay, [tokens, f"agents.left.loss={loss}"]))


def test_streaming_settings_that_cannot_act_are_refused() -> None:
    """By name and number: a window that max_lag cannot pay for, a concurrency without streaming, a deadline that the
    store's timeout would forestall."""
    refused = {
        "claim_window=2 with questions=16 makes tokens 1 steps older, max_lag=0": {"trainer.claim_window": 2},
        "claim_window=18 with questions=16 makes tokens 2 steps older, max_lag=1": {
            "trainer.claim_window": 18, "trainer.max_lag": 1,
        },
        "rollout.concurrency=4 has no effect with trainer.max_lag=0": {"rollout.concurrency": 4},
        "rollout.deadline=60 must be less than store.group_timeout=60": {
            "rollout.deadline": 60.0, "store.group_timeout": 60.0,
        },
        "trainer.oversample": {"trainer.oversample": 0.5},
        "rollout.wait_for_calls has no effect": {"rollout.wait_for_calls": "true", "trainer.max_lag": 1},
        "trainer.max_lag=0 and engines of type": {
            "rollout.wait_for_calls": "true", "agents.sub.engine.type": "vllm",
        },
    }  # fmt: skip
    for message, settings in refused.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_config(ATLAS, [f"{name}={value}" for name, value in settings.items()])


def test_a_step_claims_the_smallest_pool_that_oversample_asks_for() -> None:
    """1.1 * 10 is 11.000000000000002 in floating point, and the pool is 11."""
    for questions, oversample, pool in ((16, 1.0, 16), (10, 1.1, 11), (16, 1.5, 24), (2, 1.01, 3)):
        trainer = TrainerConfig(questions=questions, oversample=oversample)
        assert trainer.pool == pool


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        ("{type='hf'}", "float32"),
        ("{type='hf', dtype='bfloat16'}", "bfloat16"),
        ("{type='vllm', dtype='bfloat16'}", "bfloat16"),
        ("{type='vllm', dtype='bfloat16', sync='lora'}", "float32"),
        ("{type='sglang', urls=['http://10.0.0.3:30000']}", "float32"),
        ("{type='of.another:Package'}", "float32"),
    ],
)
def test_weights_travel_in_what_the_engine_computes_in(engine: str, dtype: str) -> None:
    """An engine that computes in bfloat16 is sent no more than that; adapters, and what is not known, stay float32."""
    sets = [f"agents.main.engine={engine}"]
    if "lora" in engine:
        sets.append("agents.main.policy.lora.rank=4")
    assert load_config(ATLAS, sets).agents["main"].engine.weights_dtype == dtype
