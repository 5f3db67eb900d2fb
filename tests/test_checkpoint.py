"""Checkpoints: complete or absent, exact, and a damaged one is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mgrpo.errors import CorruptionError
from mgrpo.model.policy import Policy
from mgrpo.trainer.checkpoint import latest_checkpoint, restore_checkpoint, save_checkpoint
from tests.models import tiny_policy


def trained(seed: int, steps: int) -> tuple[Policy, torch.optim.Optimizer]:
    """A policy after some optimizer steps, so that the optimizer has a state worth saving."""
    policy = tiny_policy("shift", seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, foreach=True)
    for step in range(steps):
        advance(policy, optimizer, step)
    return policy, optimizer


def advance(policy: Policy, optimizer: torch.optim.Optimizer, step: int) -> None:
    ids = torch.arange(10)[None] + step
    optimizer.zero_grad()
    (policy.hidden(ids) @ policy.head_weight.T).logsumexp(-1).sum().backward()
    optimizer.step()


def weights(policy: Policy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.parameters()]


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Steps after a restore equal those of the undisturbed trainer: weights and optimizer state are all there."""
    policy, optimizer = trained(0, 3)
    save_checkpoint(tmp_path, 3, policy, optimizer, keep=2)
    other, other_optimizer = trained(1, 0)
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 3
    restore_checkpoint(found, other, other_optimizer)
    for step in (3, 4):
        advance(policy, optimizer, step)
        advance(other, other_optimizer, step)
    assert all(torch.equal(a, b) for a, b in zip(weights(policy), weights(other), strict=True))


def test_only_the_last_are_kept_and_leftovers_do_not_count(tmp_path: Path) -> None:
    """A partial folder of a crash is no checkpoint; old ones go."""
    policy, optimizer = trained(0, 1)
    assert latest_checkpoint(tmp_path) is None
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, policy, optimizer, keep=2)
    (tmp_path / ".step-00000009.partial").mkdir()
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 3


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    """A flipped byte, a cut file or a missing one: the error names the file."""
    policy, optimizer = trained(0, 1)
    path = save_checkpoint(tmp_path, 1, policy, optimizer, keep=2).path / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0x40
        path.write_bytes(data)
    with pytest.raises(
        CorruptionError, match=name.replace(".", r"\.") if damage != "flip" else "step-00000001"
    ):
        latest_checkpoint(tmp_path)
