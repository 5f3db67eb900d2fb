"""What a service can do instead of giving the answer that was asked for; three classes, kept apart.

ServiceAnswer    an answer that is the policy's matter: a page that is not there (404, 410, 451). The caller names
                 the statuses for which that is so. Never tried again, recorded like any other answer.
ServiceFailure   infrastructure: 408, 429, 5xx, time-outs, broken connections and answers, JSON of a wrong shape.
                 Tried again; what stays fails the rollout's attempt, and no policy sees its words.
ServiceError     fatal (mgrpo/errors.py): 401, 402, 403, a missing key, an outage longer than max_outage, a replay
                 of what was not recorded. Ends the run by name.
"""

from __future__ import annotations

from typing import Literal

from mgrpo.errors import InfrastructureError, MgrpoError

Source = Literal["live", "cache", "replay"]
"""Where an answer came from: the service, the cassette (or the same request of another rollout), a replay."""


class ServiceAnswer(MgrpoError):
    """The service answered with a status that the caller named: `words` are the caller's for it, and it came from
    `source`."""

    def __init__(self, status: int, words: str, source: Source = "live") -> None:
        super().__init__(status, words, source)
        self.status, self.words, self.source = status, words, source

    def __str__(self) -> str:
        return f"{self.words} (status {self.status})"


class ServiceFailure(InfrastructureError):
    """A request that stayed without a usable answer. status: the last one (None: there was none). attempts: that were
    made. others: requests of the same service that were answered meanwhile; more than none, and it is this request that
    fails, not the service."""

    def __init__(self, words: str, status: int | None = None, attempts: int = 1, others: int = 0) -> None:
        super().__init__(words, status, attempts, others)
        self.words, self.status, self.attempts, self.others = words, status, attempts, others

    def __str__(self) -> str:
        return self.words if self.attempts == 1 else f"{self.words} ({self.attempts} attempts)"
