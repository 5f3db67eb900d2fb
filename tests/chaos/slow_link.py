"""Weights over a link that is slow for their size: once, with progress, and from where a cut left them."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import torch

from mgrpo.transport.client import Client
from mgrpo.weights.pull import IN_FLIGHT
from tests.chaos.proxy import Proxy
from tests.test_weights import MIB, Counted, Hooked, Receiver, Tensors, after, equal, label, proxied, served


def slow_link(size: int, rate: float) -> dict[str, Any]:
    """size: MiB of a version in float32; the next one is a patch of about a thirteenth of that. rate: MiB/s."""
    generator = torch.Generator().manual_seed(0)
    first = {f"layer{i}": torch.randn(size * MIB // 40, generator=generator) for i in range(10)}
    versions = first, after(first, 1, share=0.1)
    figures: dict[str, Any] = {"held": True, "mib": size, "mib_per_s": rate}
    with (
        served(first) as (weights, counted, server),
        proxied(server, rate * MIB) as (proxy, url),
        Client(url, timeout=30.0) as one,
        Client(url, timeout=30.0) as other,
    ):
        receivers = {"": Receiver(one), "_cut_at_half": Receiver(other)}
        for number, what in enumerate(("whole", "patch")):
            if number:
                weights.publish(label(1), 1, versions[1].items())
            assert weights.size is not None
            for cut, receiver in receivers.items():
                at = weights.size.nbytes // 2 if cut else math.inf
                found = _bring(receiver, number, versions[number], at, proxy, counted)
                figures[what + cut] = found
                again = 2 * IN_FLIGHT if cut else 0
                figures["held"] &= bool(found["equal"]) and found["asked_again"] <= again
                figures["held"] &= (found["arrived"] == what) and (found["resent"] > 0) == bool(cut)
    return figures


def _bring(
    receiver: Receiver, number: int, sent: Tensors, cut: float, proxy: Proxy, counted: Counted
) -> dict[str, Any]:
    """Fetch version `number`; the connection is reset once when `cut` bytes have arrived."""

    def reset() -> None:
        proxy.mode = "reset"
        threading.Timer(0.3, setattr, (proxy, "mode", "pass")).start()

    told: list[tuple[int, int]] = []
    pull = Hooked(cut, reset, progress=lambda *progress: told.append(progress))  # type: ignore[arg-type]
    pull.layout, receiver.pull = receiver.pull.layout, pull
    counted.chunks.clear()
    crossed, resent, began = proxy.answered, receiver.client.resent, time.monotonic()
    got = receiver.fetch(number)
    assert got is not None
    return {
        "arrived": "whole" if got.is_whole else "patch",
        "mib": round(got.nbytes / MIB, 1),
        "seconds": round(time.monotonic() - began, 1),
        "mib_that_crossed": round((proxy.answered - crossed) / MIB, 1),
        "asked_again": sum(counted.chunks.values()) - len(counted.chunks),
        "resent": receiver.client.resent - resent,
        "progress_reports": len(told),
        "equal": equal(receiver.tensors(), sent),
    }
