"""TRL's trainer as the trainer of one agent: a run with it ends where a run with our own trainer ends, also when it is
killed on the way, and settings that the run decides are refused."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

from mgrpo.errors import ConfigError  # noqa: E402
from mgrpo.integrations.trl import AgentTrainer  # noqa: E402
from tests import trl_cases as cases  # noqa: E402
from tests.runs import DOOMED, RELAY, ROOT, command, leftovers, started, train  # noqa: E402

PROGRAM = ROOT / "examples" / "embed_trl" / "train_sub.py"


@pytest.mark.slow
def test_a_run_with_trls_trainer_ends_where_ours_does(tmp_path: Path) -> None:
    """One of three agents is trained by the example's program. It is killed with a step applied and not saved, and
    started again; all three policies end within 1e-5 of those of a run with our trainers alone."""
    text = RELAY.read_text().replace("[agents.left]", '[agents.left]\npolicy = { trainer = "external" }')
    text = text.replace("steps = 20", "steps = 4").replace("checkpoint_every = 5", "checkpoint_every = 2")
    text = text.replace("lr = 3e-3", "lr = 1e-3")  # that of the program
    for name in ("validation", "heldout"):
        text = text.replace(f"\n{name} = 8", f"\n{name} = 4")
    own, out, run, ours = (tmp_path / name for name in ("own", "out", "run.toml", "ours.toml"))
    run.write_text(text)
    ours.write_text(text.replace('policy = { trainer = "external" }\n', ""))
    program = [sys.executable, "-W", "ignore", str(PROGRAM), str(run), "left", str(out)]
    train(ours, own)
    with started(command("train", str(run), "--out", str(out))) as launcher:
        with started([*program[:3], "-c", DOOMED, *program[3:]]) as doomed:
            assert doomed.wait(600) == -signal.SIGKILL, doomed.stdout and doomed.stdout.read()
        with started(program) as second:
            output = second.communicate(timeout=600)[0]
            assert second.returncode == 0, output
        output = launcher.communicate(timeout=600)[0]
    assert launcher.returncode == 0, output
    assert "from step 2 on" in output
    for role in ("main", "left", "right"):
        mine = load_file(own / f"agents/{role}/final/model.safetensors")
        theirs = load_file(out / f"agents/{role}/final/model.safetensors")
        start = load_file(out / f"agents/{role}/start/model.safetensors")
        assert max(float((mine[n] - theirs[n]).abs().max()) for n in mine) < 1e-5, role
        assert max(float((mine[n] - start[n]).abs().max()) for n in mine) > 1e-3, role
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any("left/policy/grad_norm" in row for row in metrics)
    assert leftovers(out) == []


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"beta": 0.1}, r"beta: 0\.1 has no effect on agent 'left', .* leave 0\.0 and set agents\.left"),
    ({"loss_type": "grpo"}, "loss_type: 'grpo' has no effect"),
    ({"temperature": 0.7}, "temperature"),
    ({"entropy_coef": 0.1}, "entropy_coef"),
    ({"use_vllm": True}, "use_vllm"),
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 2 cannot be honoured.* set 1"),
    ({"save_total_limit": 1}, "save_total_limit: 1 cannot be honoured.* set 2"),
    ({"torch_compile": True}, "torch_compile: True cannot be honoured; set False"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_the_run_decides_is_refused_before_the_run_is_joined(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    args = cases.arguments(tmp_path / "trl", **({"max_completion_length": 512} | given))
    with pytest.raises(ConfigError, match=message) as error:
        AgentTrainer(RELAY, role="left", out=tmp_path / "out", args=args)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
