"""One role's way through a trainer: its address and spool, its part of the store, its batches and its record.

A trainer has one lane, or several where roles share a policy: then one learner steps on the minibatches of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from mgrpo.config import RunConfig, config_digest
from mgrpo.config.addresses import Addresses
from mgrpo.errors import DeadlineError
from mgrpo.spool import Spool
from mgrpo.store.client import TrainerClient
from mgrpo.store.records import ClaimedGroup
from mgrpo.trainer.batch import BatchBuilder
from mgrpo.trainer.record import StepRecorder
from mgrpo.transport.keys import client_keys, server_keys
from mgrpo.transport.server import Server
from mgrpo.weights import WeightsServer

POLL_SECONDS = 1.0  # how soon a waiting trainer notices that it was told to stop


class Lane:
    """Binds the role's address when it is made, so a taken one fails before any work."""

    def __init__(
        self, config: RunConfig, role: str, folder: Path, addresses: Addresses, weights: WeightsServer
    ) -> None:
        """folder: this role's own, on this server. weights: what the role's address serves."""
        self.role, self._config = role, config
        self.recorder = StepRecorder(config.record, folder / "record", role)
        digest = config_digest(config)
        self.spool = Spool(folder / "spool", role=role, digest=digest)
        self._server = Server(
            addresses.agents[role],
            {**self.spool.handlers(), **weights.handlers()},
            barrier=self.spool.sync,
            security=server_keys(addresses),
            insecure=addresses.insecure,
        )
        self.store = TrainerClient(
            addresses.store,
            f"trainer:{role}",
            name=f"trainer-{role}",
            run=digest,
            key=client_keys(addresses, role),
            timeout=config.store.timeout,
        )
        self.builder = BatchBuilder(config, role, self.spool)

    def claim(self, step: int, check: Callable[[], None]) -> list[ClaimedGroup]:
        """The groups of this step; waits for them in slices, so that `check` notices the end of the run."""
        deadline = time.monotonic() + self._config.store.idle_timeout
        while True:
            try:
                return list(self.store.claim(n=self._config.trainer.questions, timeout=POLL_SECONDS))
            except DeadlineError:
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"trainer {self.role} at step {step}: no {self._config.trainer.questions} finished groups in "
                        f"the store's claim queue within {self._config.store.idle_timeout:g} s"
                    ) from None
            check()

    def check(self) -> None:
        """Raises MgrpoError when this role's address is not served any more."""
        self._server.check()

    def close(self) -> None:
        self._server.close()
        self.spool.close()
        self.store.close()
        self.recorder.close()
