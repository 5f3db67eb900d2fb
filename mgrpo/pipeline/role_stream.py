"""One role's way through a trainer: its address and trajectory log, its part of the store, its batches and its record.

A trainer has one role stream, or several where roles share a policy: then one learner steps on the minibatches of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from mgrpo.addresses import Addresses
from mgrpo.config import RunConfig, config_digest
from mgrpo.errors import DeadlineError
from mgrpo.pipeline.batch import BatchBuilder
from mgrpo.pipeline.step_record import StepRecorder
from mgrpo.store.records import ClaimedGroup
from mgrpo.store.trainer_client import TrainerClient
from mgrpo.trajectory_log.log import TrajectoryLog
from mgrpo.transport.keys import client_keys, server_keys
from mgrpo.transport.server import Server
from mgrpo.weights.publisher import WeightPublisher

POLL_SECONDS = 1.0  # how soon a waiting trainer notices that it is to stop


class RoleStream:
    """Binds the role's address when it is made, so a taken one fails before any work."""

    def __init__(
        self, config: RunConfig, role: str, folder: Path, addresses: Addresses, weights: WeightPublisher
    ) -> None:
        """folder: this role's own, on this server. weights: what the role's address serves."""
        self.role, self._config = role, config
        digest = config_digest(config)
        self.trajectory_log = TrajectoryLog(folder / "trajectories", role=role, digest=digest)
        self._server = Server(
            addresses.agents[role],
            {**self.trajectory_log.handlers(), **weights.handlers()},
            barrier=self.trajectory_log.sync,
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
        self.builder = BatchBuilder(config, role, self.trajectory_log, config.data_ranks(role))
        self.recorder = StepRecorder(config.record, folder / "record", role, self._log)

    def claim(self, step: int, is_wanted: Callable[[], bool]) -> list[ClaimedGroup]:
        """The groups of this step; waits for them in slices. is_wanted: whether the trainer itself waits for them,
        asked after each slice; it raises to stop waiting. Time in which it does not, or in which workers have groups in
        hand or wait for a service that is down, does not count: the store closes those of which nothing arrives."""
        limit, wanted = self._config.store.idle_timeout, self._config.trainer.pool
        busy = time.monotonic()
        while True:
            try:
                return list(self.store.claim(n=wanted, timeout=POLL_SECONDS))
            except DeadlineError:
                if time.monotonic() - busy > limit:
                    raise DeadlineError(
                        f"trainer {self.role} at step {step}: no {wanted} finished groups in "
                        f"the store's claim queue, and no worker had any in hand for {limit:g} s (store.idle_timeout)"
                    ) from None
            if not is_wanted() or (world := self.store.world()).open or world.paused:
                busy = time.monotonic()

    def check(self) -> None:
        """Raises MgrpoError when this role's address is not served any more."""
        self._server.check()

    def _log(self, line: str) -> None:
        self.store.report("phase", {"text": line})

    def close(self) -> None:
        self._server.close()
        self.trajectory_log.close()
        self.store.close()
        self.recorder.close()
