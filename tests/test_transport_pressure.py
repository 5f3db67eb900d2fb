"""Back-pressure: who produces faster than the other side takes is slowed down; memory is bounded on both sides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RECORD, LIMIT_MB = 100_000, 200
# VmHWM and not ru_maxrss: that one begins with the size of the process that started this one.
PEAK_MB = """
def peak_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) >> 10 for line in status if line.startswith("VmHWM"))
"""
TAKER = """
import sys, time
from mgrpo.transport.server import Reply, Server
with Server(sys.argv[1], {"take": lambda request: (time.sleep(0.001), Reply())[1]}):
    sys.stdin.read()
print(peak_mb())
"""
PRODUCER = """
import sys
from mgrpo.transport.client import Client
url, window, n, size = sys.argv[1], *map(int, sys.argv[2:])
with Client(url, window=window, timeout=120, resend_s=30) as client:
    futures = [client.submit("take", None, [b"x" * size]) for _ in range(n)]
    answered = sum(future.result(120) is not None for future in futures)
print(answered, peak_mb())
"""


def produce(folder: Path, producers: int, window: int, n: int) -> tuple[int, float, float]:
    """(records answered, peak MiB of a producer, peak MiB of the taker) of n records of 100 KB from each producer."""
    url = f"ipc://{folder}/s"
    taker = start(TAKER, url)
    try:
        each = [start(PRODUCER, url, str(window), str(n), str(RECORD)) for _ in range(producers)]
        said = [process.communicate(timeout=800)[0].split() for process in each]
        taken, _ = taker.communicate(timeout=800)
    finally:
        for process in (taker, *each):
            if process.poll() is None:
                process.kill()
                process.wait(60)
    return sum(int(count) for count, _ in said), max(float(mb) for _, mb in said), float(taken)


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PEAK_MB + code, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_producers_ten_times_too_fast_are_slowed_down_and_nothing_is_dropped(tmp_path: Path) -> None:
    """Four producers have 240 MB for a server that takes 1,000 records a second: each record is answered, and neither
    side ever holds more than a window's worth."""
    answered, producer, taker = produce(tmp_path, producers=4, window=64, n=600)
    assert answered == 4 * 600
    assert producer < LIMIT_MB and taker < LIMIT_MB, (producer, taker)


def test_without_a_window_the_same_records_would_fill_memory(tmp_path: Path) -> None:
    """The control: a window as large as the work is none, and the bound above is broken."""
    answered, producer, taker = produce(tmp_path, producers=1, window=10_000, n=2400)
    assert answered == 2400
    assert max(producer, taker) > LIMIT_MB, (producer, taker)
