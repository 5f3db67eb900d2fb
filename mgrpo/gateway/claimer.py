"""`mgrpo gateway`: plays the rollouts of a run on another machine, with a command.

    claim (waits for a rollout) -> the command, as command.py starts it -> its answer, or its error -> claim ...

One place of `concurrency` is one rollout under way; several addresses (one a rollout worker) share the places. While a
command runs, its rollout hears of it every few seconds; a rollout that is over ends its command. Between its batches a
worker may train for minutes and answer nobody, so an address that does not answer is asked again, with pauses that
double, for `patience` seconds. A run that is over says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mgrpo.errors import ConfigError, DeadlineError, InfrastructureError, MgrpoError
from mgrpo.gateway.access import Access
from mgrpo.gateway.command import Command, run_command

if TYPE_CHECKING:
    import httpx2

CLAIM_SECONDS = 20.0  # that a claim waits at the gateway
ANSWER_SECONDS = 60.0  # for every other request
AFTER_SECONDS = 30.0  # after the end of a run, for a worker that is started again
LONGEST_PAUSE = 15.0
GOODBYE_SECONDS = 5.0  # to give rollouts back when this process is stopped

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Claimer:
    """What plays rollouts. key: of the gateways; None where they ask for none. patience: seconds that a gateway may not
    answer. say: takes one line for people."""

    command: Command
    key: str | None
    concurrency: int
    patience: float
    say: Say
    after: float = AFTER_SECONDS
    beats: float = 4.0  # signs of life within the time after which a rollout is lost

    async def play(self, urls: Sequence[str]) -> None:
        """Play the rollouts of all `urls` until their runs are over. Raises DeadlineError for one that does not answer,
        ConfigError for one that refuses the key or is no gateway of a remote harness, once the others are over."""
        httpx2 = client_library()
        places = asyncio.Semaphore(self.concurrency)
        limits = httpx2.Limits(max_connections=2 * self.concurrency + len(urls))
        async with httpx2.AsyncClient(timeout=ANSWER_SECONDS, limits=limits, trust_env=False) as http:
            ends = await asyncio.gather(
                *(_Address(self, http, url, places, len(urls)).play() for url in urls), return_exceptions=True
            )
        for end in ends:
            if isinstance(end, BaseException):
                raise end


class _Over(Exception):
    """The run is, or this gateway's part of it."""


class _Address:
    """One gateway."""

    def __init__(
        self, claimer: Claimer, http: httpx2.AsyncClient, url: str, places: asyncio.Semaphore, urls: int
    ) -> None:
        self._claimer, self._http, self._url, self._places = claimer, http, url.rstrip("/"), places
        self._wait = CLAIM_SECONDS if urls == 1 else 2.0  # a claim holds a place, which others may need
        self._jobs: set[asyncio.Task[None]] = set()
        self._answered, self._over_at = time.monotonic(), 0.0
        self._pauses = 0

    async def play(self) -> None:
        self._claimer.say(f"{self._url}: waiting for rollouts")
        try:
            while True:
                await self._places.acquire()
                try:
                    offer = await self._claim()
                except BaseException:
                    self._places.release()
                    raise
                if offer is None:
                    self._places.release()
                    continue
                job = asyncio.create_task(self._job(offer))
                self._jobs.add(job)
                job.add_done_callback(self._jobs.discard)
        except _Over:
            self._claimer.say(f"{self._url}: the run is over")
        finally:
            for job in self._jobs:
                job.cancel()
            await asyncio.gather(*self._jobs, return_exceptions=True)

    async def _claim(self) -> dict[str, Any] | None:
        """A rollout; None where there is none yet. Raises _Over, DeadlineError and ConfigError."""
        headers = {} if self._claimer.key is None else {"Authorization": f"Bearer {self._claimer.key}"}
        import httpx2

        try:
            answer = await self._http.post(
                f"{self._url}/harness/claim", json={"wait": self._wait}, headers=headers,
                timeout=self._wait + ANSWER_SECONDS,
            )  # fmt: skip
        except httpx2.TransportError as error:
            await self._silent(f"{type(error).__name__} {error}".strip())
            return None
        if answer.status_code == 200:
            self._answered, self._over_at, self._pauses = time.monotonic(), 0.0, 0
            try:
                offer = dict(answer.json())
            except (ValueError, TypeError):
                raise ConfigError(f"{self._url} is no gateway: its answer is no JSON object") from None
            return None if offer.get("rollout") is None else offer
        if answer.status_code == 410:
            self._over_at = self._over_at or time.monotonic()
        elif answer.status_code in (401, 403):
            raise ConfigError(f"{self._url} refuses the harness key (status {answer.status_code})")
        elif answer.status_code in (404, 405):
            raise ConfigError(
                f"{self._url} is no gateway of a run with task.options.remote (status {answer.status_code})"
            )
        await self._silent(f"status {answer.status_code}")
        return None

    async def _silent(self, why: str) -> None:
        """Pause; raise where it has lasted too long."""
        now = time.monotonic()
        if self._over_at and now - self._over_at >= self._claimer.after:
            raise _Over
        if now - self._answered >= self._claimer.patience:
            raise DeadlineError(f"{self._url} has answered no claim for {self._claimer.patience:g} s: {why}")
        pause = min(0.25 * 2.0**self._pauses, LONGEST_PAUSE) * random.uniform(0.5, 1.5)
        self._pauses = min(self._pauses + 1, 10)
        ends = [self._answered + self._claimer.patience]
        if self._over_at:
            ends.append(self._over_at + self._claimer.after)
        await asyncio.sleep(max(0.0, min(pause, min(ends) - now)))

    # -- one rollout -----------------------------------------------------------------------------------------------

    async def _job(self, offer: dict[str, Any]) -> None:
        """Its command, and what came of it."""
        access = Access(str(offer["base_url"]), str(offer["api_key"]))
        question = offer["question"]
        name = str(question.get("id") or offer["rollout"][:8])
        began = time.monotonic()
        try:
            body, words = await self._result(access, question, float(offer["alive_seconds"]))
            await self._tell(access, body)
            self._claimer.say(f"{name}: {words} after {time.monotonic() - began:.1f} s")
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(GOODBYE_SECONDS):
                    await self._post(access, "answer", {"error": "mgrpo gateway was stopped", "retry": True})
            raise
        finally:
            self._places.release()

    async def _result(
        self, access: Access, question: dict[str, Any], alive_seconds: float
    ) -> tuple[dict[str, Any], str]:
        """(what the gateway is told, what people are)."""
        command = self._claimer.command
        environment = {n: v for n, v in os.environ.items() if v != self._claimer.key} | access.environment()
        running = asyncio.create_task(run_command(command, question, environment))
        alive = asyncio.create_task(self._stay_alive(access, alive_seconds / self._claimer.beats))
        try:
            await asyncio.wait({running, alive}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                return {}, "its rollout was over before it had ended"
            answer = running.result()
        except MgrpoError as error:
            retry = isinstance(
                error, InfrastructureError | ConfigError
            )  # the latter is this machine's matter
            return {"error": str(error), "retry": retry}, f"failed ({error})"
        finally:
            running.cancel()
            alive.cancel()
            await asyncio.gather(running, alive, return_exceptions=True)
        scores: dict[str, Any] = {}
        for place, named in answer.scores.items():
            scores |= {place: dict(named)} if isinstance(place, str) else {}
        for role in {place[0] for place in answer.scores if not isinstance(place, str)}:
            many = sorted(
                (p[1], dict(n)) for p, n in answer.scores.items() if not isinstance(p, str) and p[0] == role
            )
            scores[role] = [named for _, named in many]
        body = {"answer": answer.value, "correct": answer.correct, "scores": scores}
        return {k: v for k, v in body.items() if k == "answer" or v not in (None, {})}, "answered"

    async def _stay_alive(self, access: Access, every: float) -> None:
        """Returns once the rollout is over."""
        import httpx2

        while True:
            await asyncio.sleep(every)
            with contextlib.suppress(httpx2.TransportError):
                if (await self._post(access, "alive", {})).status_code == 404:
                    return

    async def _tell(self, access: Access, body: dict[str, Any]) -> None:
        """The gateway learns what came of a rollout, if that still matters to it."""
        import httpx2

        pause, until = 0.25, time.monotonic() + self._claimer.patience
        while body and time.monotonic() < until:
            with contextlib.suppress(httpx2.TransportError):
                status = (await self._post(access, "answer", body)).status_code
                if status in (400, 413) and "error" not in body:
                    what = "did not understand" if status == 400 else "has no room for"
                    body = {"error": f"the gateway {what} the command's answer", "retry": False}
                    continue
                if status < 500:
                    return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _post(self, access: Access, what: str, body: dict[str, Any]) -> httpx2.Response:
        return await self._http.post(f"{access.root}/{what}", json=body, headers=access.headers)


def client_library() -> Any:
    """httpx2. Raises ConfigError where it is not installed."""
    try:
        import httpx2
    except ImportError:
        raise ConfigError('mgrpo gateway needs httpx2; pip install "mgrpo[server-client]"') from None
    return httpx2
