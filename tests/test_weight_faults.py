"""Weights under faults: short forms of what tests/chaos does at length; and what a version costs on the link."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mgrpo.transport.client import Client
from mgrpo.weights.history import History
from mgrpo.weights.publisher import WeightPublisher
from tests.chaos.slow_link import slow_link
from tests.chaos.weights import kill_weights
from tests.test_weights import Receiver, after, equal, label, model, served


def test_no_token_carries_a_version_that_did_not_sample_it(tmp_path: Path) -> None:
    """Trainer and worker are killed, the link is reset and silent, each in the middle of a transfer. Every token's
    log-prob is that of its version; with the version before, it would not be. Nothing hangs."""
    found = kill_weights(tmp_path, kills=4, seed=1)
    assert not found["wrong"] and found["worst_gap"] <= 1e-4 and found["tokens"] > 100
    assert found["control_gap"] > 0.01, "the versions are too alike for the test to fail"
    assert found["in_the_middle"] == 4 and found["loads"]["patch"] >= 1 <= found["loads"]["whole"]


def test_a_slow_link_carries_whole_versions_and_patches_once_and_goes_on_after_a_cut() -> None:
    """12 MiB and a patch of 2 MiB at 4 MiB/s. What was under way when the link was cut is asked for again, and no
    more."""
    found = slow_link(12, 4.0)
    assert found["held"], found
    assert found["whole"]["progress_reports"] >= 1
    assert found["whole"]["mib_that_crossed"] < 1.02 * found["whole"]["mib"] + 0.1


def test_who_asks_while_a_version_is_published_does_not_stop_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The history asks the publisher who pulls, the publisher asks the history which patches there are; each under a
    lock of its own. They come at the same moment."""
    asked = threading.Event()
    forget, patches = History._forget, History.patches

    def late_forget(history: History, *arguments: Any) -> None:
        asked.wait(10.0)
        forget(history, *arguments)

    def told_patches(history: History, *arguments: Any) -> Any:
        asked.set()
        return patches(history, *arguments)

    first = model(1 << 16)
    second = after(first, 1)
    with (
        served(first, second) as (weights, _, server),
        Client(server.url, timeout=20) as client,
        Client(server.url, timeout=20) as other,
    ):
        receiver = Receiver(client)
        receiver.fetch(1)
        weights.publish(label(2), 2, first.items())
        monkeypatch.setattr(History, "_forget", late_forget)
        monkeypatch.setattr(History, "patches", told_patches)
        put = threading.Thread(target=weights.publish, args=(label(3), 3, second.items()), daemon=True)
        put.start()
        assert receiver.fetch(2) is not None
        assert Receiver(other).fetch(3) is not None
        put.join(20)
        assert not put.is_alive() and equal(receiver.tensors(), first)


def test_a_publisher_knows_what_its_newest_version_costs() -> None:
    """As many bytes as a receiver that holds the version before pulls; a whole version where that is shorter, and none
    where the bytes go another way."""
    first = model(1 << 16)
    with served(first) as (weights, _, server), Client(server.url, timeout=30) as client:
        receiver = Receiver(client)
        whole = receiver.fetch()
        assert whole is not None and weights.size is not None
        assert whole.nbytes == weights.size.whole - 4 * len(
            whole.layout.slices
        )  # the checksums are a part too
        assert weights.size.share == 1.0
        weights.publish(label(1), 1, after(first, 1).items())
        patch = receiver.fetch(1)
        assert patch is not None and not patch.is_whole and patch.nbytes == weights.size.nbytes
        assert weights.size.share < 0.2
        weights.publish(label(2), 2, model(1 << 16, 5).items())
        assert 0.5 < weights.size.share <= 1.0
        weights.announce(label(3), 3)
        assert weights.size is None
    assert WeightPublisher(torch.float32).size is None
