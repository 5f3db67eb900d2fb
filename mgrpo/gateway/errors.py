"""What the gateway refuses, in the status codes and codes that SDKs understand."""

from __future__ import annotations

from mgrpo.errors import MgrpoError


class GatewayError(MgrpoError):
    """A request that is not answered. status: of HTTP; code: one word for programs, e.g. "context_length_exceeded".
    400 what no retry mends, 401 a wrong token, 404 a model or rollout that is not there, 409 a rollout that is over or
    a history that was rewritten, 413 a body that is too large, 429 too many requests at once, 503 the engine: an SDK
    may ask again."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code
