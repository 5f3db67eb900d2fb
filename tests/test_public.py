"""The package as its users meet it: what a type checker sees from outside, and what an import brings along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mgrpo

ROOT = Path(__file__).parent.parent

RIGHT = """
import numpy as np
import torch

import mgrpo

batcher = mgrpo.Batcher(k=2, d_max={"main": 1, "sub": 3}, capacity=64)
plan: mgrpo.Plan = batcher.plan(0)
rows: int = plan.unique
config = mgrpo.GrpoLossConfig(type="dapo")
loss, metrics = mgrpo.grpo_loss(
    torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
    advantages=torch.ones(2), config=config,
)
value: torch.Tensor = loss
result = mgrpo.linear_grpo_loss(
    torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.long), advantages=torch.ones(2),
    loss_mask=torch.ones(2, 3), token_weight=torch.ones(2, 3), denominator=torch.tensor(6), config=config, tokens=True,
)
ratio: torch.Tensor = result[2].ratio
reveal_type(mgrpo.group_advantage(torch.ones(2), torch.zeros(2, dtype=torch.int32)))
reveal_type(mgrpo.Rollout)
reveal_type(mgrpo.connect("tcp://127.0.0.1:5600", "worker", timeout=5.0))
reveal_type(mgrpo.connect("tcp://127.0.0.1:5600", "trainer:sub"))
"""

WRONG = {
    'mgrpo.Batcher(k="two", d_max=1, capacity=64)': "arg-type",
    "mgrpo.Batcher(k=2, d_max=1, capacity=64, no_such_option=1)": "call-arg",
    "mgrpo.GrpoLossConfig(type=3)": "arg-type",
    "mgrpo.no_such_name": "attr-defined",
    'mgrpo.align("two")': "arg-type",
    "mgrpo.TokenValues(logprobs=None)": "call-arg",
}


def test_a_type_checker_sees_the_public_names(tmp_path: Path) -> None:
    """Right use of the package passes mypy --strict from outside; each wrong use is an error of its own kind."""
    (tmp_path / "right.py").write_text(RIGHT)
    lines = ["import mgrpo", *WRONG]
    (tmp_path / "wrong.py").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache"),
         "--config-file", "", "right.py", "wrong.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    right = [line for line in done.stdout.splitlines() if line.startswith("right.py")]
    assert not [line for line in right if ": error:" in line], done.stdout
    revealed = " ".join(line for line in right if "Revealed type" in line)
    assert len(right) == 4 and "Tensor" in revealed
    assert "WorkerClient" in revealed and "TrainerClient" in revealed
    assert '"object"' not in revealed and '"Any"' not in revealed
    for number, (use, kind) in enumerate(WRONG.items(), 2):
        assert any(
            line.startswith(f"wrong.py:{number}: error:") and f"[{kind}]" in line
            for line in done.stdout.splitlines()
        ), f"{use}: expected an error [{kind}]\n{done.stdout}{done.stderr}"


def test_every_public_name_resolves() -> None:
    """What is listed is there, and nothing is exported that the list of modules forgets."""
    assert set(mgrpo.__all__) == {"__version__", *mgrpo._PUBLIC}
    for name in mgrpo.__all__:
        assert getattr(mgrpo, name) is not None


def test_importing_the_package_warns_of_nothing_and_loads_nothing_heavy() -> None:
    """Also where every warning is an error; each public name then resolves without one."""
    code = (
        "import sys, mgrpo\n"
        "heavy = {'torch', 'numpy', 'transformers', 'zmq', 'triton', 'vllm', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert dir(mgrpo) == sorted(mgrpo.__all__)\n"
        "for name in mgrpo.__all__: getattr(mgrpo, name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
