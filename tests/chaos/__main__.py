"""The long forms: python -m tests.chaos [NAME ...]. Prints one JSON line each and exits 1 when a promise is
broken."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from mgrpo.store.server import StoreServer
from tests.chaos.kills import STATIONS, kill_store, kill_trainer
from tests.chaos.proxy import proxy_faults
from tests.chaos.runs import kill_run
from tests.chaos.slow_link import slow_link
from tests.chaos.weights import kill_weights
from tests.chaos.wire import CannotBuild, lossy_run
from tests.ledger_machine import LedgerMachine
from tests.powercut import cuts, work
from tests.runs import RELAY, final_weights, train
from tests.schedules import World
from tests.store_kit import publish, rss_mb, run_params
from tests.test_store_refusals import storm
from tests.test_transport_faults import fuzz_headers

Result = tuple[bool, dict[str, Any]]


def ledger(folder: Path) -> Result:
    """The state machine with fresh random programs."""
    long = settings(
        max_examples=2000, stateful_step_count=60, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(LedgerMachine, settings=long)
    return True, {"programs": 2000, "steps": 60}


def schedules(folder: Path) -> Result:
    for seed in range(10_000):
        World(seed).run()
    return True, {"schedules": 10_000}


def powercut(folder: Path) -> Result:
    (folder / "run").mkdir()
    verdict = cuts(work(folder / "run", 1, 400, "FULL", True), folder, 1200, seed=2)
    normal = cuts(_work(folder, "normal", "NORMAL", True), folder / "normal", 60, seed=2)
    unsynced = cuts(_work(folder, "unsynced", "FULL", False), folder / "unsynced", 60, seed=2)
    figures = {
        "cuts": verdict.cuts, "acked_checked": verdict.acked,
        "lost": verdict.lost, "corrupt": verdict.corrupt,
        "control_normal_lost": normal.lost, "control_no_fsync_corrupt": unsynced.corrupt,
    }  # fmt: skip
    return verdict.lost == verdict.corrupt == 0 and normal.lost > 0 and unsynced.corrupt > 0, figures


def _work(folder: Path, name: str, synchronous: str, obeys_sync: bool) -> Any:
    (folder / name).mkdir()
    return work(folder / name, 1, 60, synchronous, obeys_sync)


def store(folder: Path) -> Result:
    figures = kill_store(folder, kills=100, seed=1)
    broken = figures["lost"] + figures["duplicates"] + figures["errors"]
    return broken == 0 and figures["acks"] >= 100_000, figures


def trainer(folder: Path) -> Result:
    """20 deaths at each of the five stages."""
    steps, rng = 42, random.Random(1)
    quiet = kill_trainer(folder / "quiet", [], steps)
    ends = []
    for number in range(5):
        deaths = [(STATIONS[(i + number) % 5], 2 * i + 1) for i in range(20)]
        rng.shuffle(deaths)
        ends.append(kill_trainer(folder / f"killed{number}", sorted(deaths, key=lambda d: d[1]), steps))
    equal = sum(end["weights"] == quiet["weights"] and end["trained"] == quiet["trained"] for end in ends)
    restarts = [end["restarts"] for end in ends]
    return equal == len(ends) and min(map(int, map(str, restarts))) == 20, {
        "deaths": restarts,
        "bit_equal": equal,
    }


def proxy(folder: Path) -> Result:
    figures = proxy_faults(folder, 50, seed=1)
    return figures["lost"] == 0 and float(str(figures["recovery_p95_s"])) < 2.0, figures


def fuzz(folder: Path) -> Result:
    """Headers against the decoder; whole requests against a live store."""
    fuzz_headers(10_000, seed=0)
    before = rss_mb()
    refused = fuzz_headers(1_000_000, seed=1)
    grown = rss_mb() - before
    with StoreServer("tcp://127.0.0.1:0", folder / "s.db", run_params(max_lag=100)) as server:
        for role in ("main", "sub"):
            publish(server.url, role).close()
        storm(server, 5_000, seed=0)
        grown_store = storm(server, 50_000, seed=1)
        broken = server.counters().get("INTERNAL", 0) + (server.failure is not None)
    return grown < 20 and grown_store < 20 and not broken, {
        "headers": 1_000_000, "refused": refused, "rss_growth_mb": round(grown, 1),
        "requests": 50_000, "store_growth_mb": round(grown_store, 1), "handlers_failed": broken,
    }  # fmt: skip


def run(folder: Path) -> Result:
    """A whole training run with a kill -9 of a random process every 5 s, as often as 2 minutes have room for."""
    figures = kill_run(folder, steps=120, seconds=120, every=5.0, seed=1)
    good = (
        figures["kills"] == 24 and figures["bit_equal"] and figures["learned"] and figures["each_group_once"]
    )
    return bool(good) and not figures["left_behind"], figures


def streaming(folder: Path) -> Result:
    """The same with streaming rollouts of two workers: each group once and none too old, though not the same bits."""
    overrides = ("trainer.max_lag=2", "rollout.workers=2")
    figures = kill_run(folder, steps=600, seconds=120, every=5.0, seed=2, overrides=overrides)
    good = figures["kills"] == 24 and figures["learned"] and figures["each_group_once"]
    return bool(good and int(str(figures["oldest"])) <= 2 and not figures["left_behind"]), figures


def weights(folder: Path, kills: int = 50) -> Result:
    """Trainer, worker and link fail in the middle of transfers of weights; every token is recomputed."""
    figures = kill_weights(folder, kills, seed=1)
    good = not figures["wrong"] and figures["in_the_middle"] == kills and figures["control_gap"] > 0.01
    return good and figures["loads"].get("patch", 0) > 0, figures


def slow(folder: Path) -> Result:
    """500 MiB of weights over 10 MiB/s, whole and as a patch, and cut at half."""
    figures = slow_link(500, 10.0)
    return bool(figures.pop("held")), figures


def network(folder: Path) -> Result:
    """A run across two network namespaces with 1 % loss and 50 ms delay each way, beside one on this machine."""
    train(RELAY, folder / "quiet")
    try:
        figures = lossy_run(folder, steps=20)
    except CannotBuild as why:
        return True, {"skipped": str(why)}
    equal = figures.pop("weights") == final_weights(folder / "quiet")
    return equal, {**figures, "bit_equal": equal}


ALL: dict[str, Callable[..., Result]] = {
    f.__name__: f
    for f in (
        ledger,
        schedules,
        powercut,
        store,
        trainer,
        proxy,
        fuzz,
        run,
        streaming,
        weights,
        slow,
        network,
    )
}


def main(arguments: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    p.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(ALL)}; all when left out")
    p.add_argument("--kills", type=int, default=50, help="of `weights`")
    args = p.parse_args(arguments)
    good = True
    for name in args.names or list(ALL):
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            how = {"kills": args.kills} if name == "weights" else {}
            held, figures = ALL[name](Path(folder), **how)
            good = good and held
            line = {"test": name, "held": held, **figures, "seconds": round(time.monotonic() - began, 1)}
            print(json.dumps(line), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
