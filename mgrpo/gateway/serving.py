"""One server a process and address, whoever needs it: the tasks of all stages and evaluations of a worker share it.

    held = hold(options, ...)      # begins to start it, the first time
    await held.started()
    held.gateway.open(rollout)
    await held.release()           # the last one closes it

The server's tasks belong to no rollout: it is started in a context of its own, so that the end of the rollout which
happened to come first ends none of them (mgrpo/environments/attempt.py).
"""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context
from dataclasses import dataclass, field

from mgrpo.gateway.options import GatewayOptions
from mgrpo.gateway.remote import Claims, Endpoint
from mgrpo.gateway.server import Gateway

log = logging.getLogger("mgrpo.gateway")


@dataclass(frozen=True, slots=True)
class ClaimOptions:
    """How programs elsewhere claim rollouts: their key, and bounds of HarnessOptions."""

    key: str | None = field(repr=False)
    max_outage: float
    alive_seconds: float


class Served:
    """A server and what is claimed through it, made by hold()."""

    def __init__(
        self, options: GatewayOptions, claiming: ClaimOptions | None, name: tuple[object, ...]
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.claims: Claims | None = None
        if claiming is not None:
            self.claims = Claims(claiming.key, claiming.max_outage, claiming.alive_seconds)
        self.gateway = Gateway(options, None if self.claims is None else Endpoint(self.claims))
        self.users = 0
        self._name = name
        self._start = self.loop.create_task(self._begin(), context=Context())

    async def _begin(self) -> None:
        await self.gateway.start()
        if self.claims is not None:  # a warning, since it is to be seen in the worker's log
            log.warning("rollouts wait for programs: mgrpo gateway %s --command ...", self.gateway.url)

    async def started(self) -> None:
        """Raises ConfigError naming an address that cannot be listened on."""
        await asyncio.shield(self._start)

    async def release(self) -> None:
        """Give up what hold() gave; the last one closes the server. Once for each hold()."""
        self.users -= 1
        if self.users:
            return
        if _open.get(self._name) is self:
            del _open[self._name]
        if self.claims is not None:
            self.claims.close()
        await asyncio.wait({self._start})
        await self.gateway.close()
        if not self._start.cancelled():
            self._start.exception()  # retrieved: who waited for it has raised it


_open: dict[tuple[object, ...], Served] = {}


def hold(options: GatewayOptions, claiming: ClaimOptions | None = None) -> Served:
    """The server of these options on the running loop, made where there is none. Raises ConfigError as Gateway."""
    for name in [name for name, served in _open.items() if served.loop.is_closed()]:
        del _open[name]  # its loop took it along
    name = (id(asyncio.get_running_loop()), options.host, options.port, options.advertise, claiming)
    served = _open.get(name)
    if served is None:
        served = _open[name] = Served(options, claiming, name)
    served.users += 1
    return served
