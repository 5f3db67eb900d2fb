"""Two network namespaces and a wire between them that loses and delays packets.

A veth pair with netem where the kernel has it; else two TUN devices joined by a thread that drops and holds back IP
packets. Either way the kernel's own TCP meets real loss.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import selectors
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from mgrpo.transport.keys import add_key, init_keys
from tests.runs import RELAY, ROOT, command, final_weights, started

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


class CannotBuild(Exception):
    """This machine cannot make namespaces or a wire; the text says why."""


class Wire:
    """Namespaces `near` and `far` with the given addresses. Use as a context manager."""

    def __init__(
        self, near: Sequence[str], far: Sequence[str], *, loss: float, delay_s: float, seed: int
    ) -> None:
        self._addresses = {"near": near, "far": far}
        self._loss, self._delay_s, self._random = loss, delay_s, random.Random(seed)
        tag = f"mg{os.getpid()}"
        self._spaces = {"near": f"{tag}a", "far": f"{tag}b"}
        self._tuns: list[int] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.kind = ""
        self.passed = self.lost = 0

    def inside(self, side: str, command: Sequence[str]) -> list[str]:
        """The command that runs `command` in a namespace."""
        return ["ip", "netns", "exec", self._spaces[side], *command]

    def __enter__(self) -> Wire:
        if os.geteuid() != 0:
            raise CannotBuild("network namespaces need root")
        try:
            for space in self._spaces.values():
                _ip("netns", "add", space)
                _ip("-n", space, "link", "set", "lo", "up")
            self._veth() if _has_netem() else self._tun()
            for side, space in self._spaces.items():
                for address in self._addresses[side]:
                    _ip("-n", space, "addr", "add", f"{address}/24", "dev", space)
                _ip("-n", space, "link", "set", space, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
        for tun in self._tuns:
            os.close(tun)
        for space in self._spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def _veth(self) -> None:
        self.kind = "veth, netem"
        near, far = self._spaces.values()
        _ip("link", "add", near, "netns", near, "type", "veth", "peer", "name", far, "netns", far)
        for space in (near, far):
            rule = ["netem", "delay", f"{self._delay_s * 1000:g}ms", "loss", f"{self._loss * 100:g}%"]
            _run(["ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", space, "root", *rule])

    def _tun(self) -> None:
        self.kind = "tun"
        for space in self._spaces.values():
            try:
                tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                self._tuns.append(tun)
                fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", space.encode(), _IFF_TUN | _IFF_NO_PI))
            except OSError as error:
                raise CannotBuild(f"no netem in this kernel, and no TUN device: {error}") from None
            _ip("link", "set", space, "netns", space)
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        """Packets wait in a heap until they are due."""
        under_way: list[tuple[float, int, int, bytes]] = []
        number = 0
        with selectors.DefaultSelector() as selector:
            for tun, other in (self._tuns, self._tuns[::-1]):
                selector.register(tun, selectors.EVENT_READ, other)
            while not self._stop.is_set():
                due = under_way[0][0] - time.monotonic() if under_way else 0.1
                for key, _ in selector.select(max(0.0, min(due, 0.1))):
                    packet = _read(key.fd)
                    if packet is None:
                        continue
                    if self._random.random() < self._loss:
                        self.lost += 1
                        continue
                    number += 1
                    heapq.heappush(under_way, (time.monotonic() + self._delay_s, number, key.data, packet))
                while under_way and under_way[0][0] <= time.monotonic():
                    _, _, target, packet = heapq.heappop(under_way)
                    try:
                        os.write(target, packet)
                        self.passed += 1
                    except OSError:  # the device is not up yet, or its queue is full: one more lost packet
                        self.lost += 1


def _read(tun: int) -> bytes | None:
    try:
        return os.read(tun, 65536)
    except OSError:
        return None


def _has_netem() -> bool:
    """Whether this kernel can shape with netem, tried on a device that is gone afterwards."""
    name = f"mg{os.getpid()}t"
    if subprocess.run(["ip", "link", "add", name, "type", "veth"], capture_output=True).returncode:
        return False
    try:
        rule = ["tc", "qdisc", "add", "dev", name, "root", "netem", "delay", "1ms"]
        return subprocess.run(rule, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
    finally:
        subprocess.run(["ip", "link", "del", name], capture_output=True)


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(arguments: Sequence[str]) -> None:
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        raise CannotBuild(f"no {arguments[0]} on PATH") from None
    if done.returncode:
        raise CannotBuild(f"{' '.join(arguments)}: {done.stderr.strip()}")


def lossy_run(folder: Path, steps: int, loss: float = 0.01, delay_s: float = 0.05) -> dict[str, object]:
    """The run of tests/relay.toml with store and main on one side, the other agents and the worker on the other, each
    at an address of its own, with encrypted links. Raises CannotBuild."""
    roles = {"main": "10.77.0.2", "left": "10.77.0.12", "right": "10.77.0.13"}
    keys = folder / "keys"
    init_keys(keys)
    for name, who in (("worker", "worker"), *((role, f"trainer:{role}") for role in roles)):
        add_key(keys, name, who)
    sets = [f"--set=agents.{role}.url=tcp://{host}:5601" for role, host in roles.items()]
    sets += [
        "--set=store.url=tcp://10.77.0.1:5600",
        f"--set=link.keys={keys}",
        f"--set=trainer.steps={steps}",
    ]
    out = folder / "run"

    def part(side: str, *arguments: str) -> list[str]:
        return wire.inside(side, command(*arguments, "--out", str(out), *sets))

    wire = Wire(["10.77.0.1", "10.77.0.2"], ["10.77.0.12", "10.77.0.13"], loss=loss, delay_s=delay_s, seed=1)
    with wire, started(part("near", "store", "--config", str(RELAY))) as store:
        began = time.monotonic()
        with (
            started(part("near", "trainer", str(RELAY), "--agent", "main")) as main,
            started(part("far", "trainer", str(RELAY), "--agent", "left")) as left,
            started(part("far", "trainer", str(RELAY), "--agent", "right")) as right,
            started(part("far", "rollout", str(RELAY))) as worker,
        ):
            for process in (worker, main, left, right):
                output, _ = process.communicate(timeout=240)
                assert process.returncode == 0, output
        assert store.poll() is None
        seconds = time.monotonic() - began
    return {
        "wire": wire.kind, "packets": wire.passed, "lost": wire.lost, "steps": steps, "run_s": round(seconds, 1),
        "weights": final_weights(out),
    }  # fmt: skip
