"""What the services of this process have done, by name: for the metrics of a rollout worker, of an evaluation, of a
calibration. Two clients of one name count together."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counters:
    """Of one service since the process began."""

    calls: int = 0
    """Requests that were asked for, from whatever source their answers came."""
    live: int = 0
    """Those that went out and were answered, an answer of the policy's matter included."""
    cache: int = 0
    """Those that the cassette answered, or the same request of another rollout that was under way."""
    replay: int = 0
    """Those that a replay answered."""
    retries: int = 0
    """Attempts beyond the first."""
    failures: int = 0
    """Requests that failed in the end."""
    outages: int = 0
    """How often the service was down."""
    waited: float = 0.0
    """Seconds that calls waited for it then, summed over calls."""
    seconds: float = 0.0
    """Of the attempts, summed; without the waits and pauses between them."""
    tokens_in: int = 0
    """Of a chat model: tokens of the prompts, as its server counts them."""
    tokens_out: int = 0
    """Of a chat model: tokens that it sampled, as its server counts them."""

    def metrics(self, name: str) -> dict[str, float]:
        """Full name -> value, of what is not 0."""
        return {f"service/{name}/{key}": float(value) for key, value in asdict(self).items() if value}


_of: dict[str, Counters] = {}
_taken: dict[str, float] = {}


def counters_of(name: str) -> Counters:
    """Those of the services of this name."""
    return _of.setdefault(name, Counters())


def take() -> dict[str, float]:
    """Full name -> how much was added since the last call, of every service of the process."""
    now: dict[str, float] = {}
    for name, counters in _of.items():
        now |= counters.metrics(name)
    added = {key: value - _taken.get(key, 0.0) for key, value in now.items()}
    _taken.update(now)
    return {key: value for key, value in added.items() if value}
