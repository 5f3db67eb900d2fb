"""A real bad judge: SmolLM2-135M on a real server, behind the OpenAI route, as a run would ask it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import httpx2
import pytest

from mgrpo.errors import ConfigError
from mgrpo.scoring.judge import Judge, JudgeConfig
from mgrpo.services.client import Reply
from mgrpo.services.openai import ChatService
from tests_vllm.kit import START_SECONDS, Served

pytestmark = pytest.mark.timeout(900)
SHORT = "Is the answer correct?\nQuestion: {question}\nCorrect answer: {gold}\nAnswer: {answer}\n"
CONFIG = JudgeConfig(
    url="http://localhost",
    model="policy",
    template=SHORT,  # the built-in one is three times as long, which is most of the time on a CPU
    max_tokens=32,
    asks=1,
    timeout=START_SECONDS,
    concurrency=24,
)


class Model:
    """The server's model, which keeps its replies. schemas: whether the server is asked for JSON of a schema; without,
    it is like one that does not know the field."""

    def __init__(self, live: Served, *, schemas: bool) -> None:
        transport = httpx2.AsyncHTTPTransport(uds=live.url.removeprefix("unix://"))
        self._service, self._schemas = ChatService("judge", CONFIG, transport=transport), schemas
        self.replies: list[str] = []

    async def complete(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        schema: Mapping[str, object] | None = None,
        pure: bool = True,
        occurrence: str = "",
    ) -> Reply[str]:
        wanted = schema if self._schemas else None
        reply = await self._service.complete(messages, schema=wanted, pure=pure, occurrence=occurrence)
        self.replies.append(reply.value)
        return reply

    async def close(self) -> None:
        await self._service.close()


def calibrated(live: Served, *, schemas: bool) -> tuple[str, dict[str, float], list[str]]:
    """What calibration says as it stops the run, the judge's counts, and all replies."""

    async def calibrate() -> tuple[str, dict[str, float], list[str]]:
        model = Model(live, schemas=schemas)
        judge = Judge(CONFIG, service=model)
        try:
            with pytest.raises(ConfigError) as caught:
                await judge.calibrate()
        finally:
            await judge.close()
        return str(caught.value), judge.metrics(), model.replies

    words, metrics, replies = live.do(calibrate())
    print(words)
    assert re.search(
        r"^judge \(model 'policy'\) agrees with \d+ of 24 .* expected at least calibration=0.9: ", words
    )
    assert len(replies) == 24
    return words, metrics, replies


def test_replies_without_a_verdict_are_failures(live: Served) -> None:
    """Asked without a schema it murmurs, mostly with the word "correct" somewhere. Only a reply whose last line is a
    verdict could count; every other one is a failure, and no verdict of it."""
    _, metrics, replies = calibrated(live, schemas=False)
    named = sum("correct" in reply.lower() for reply in replies)
    ends = [re.fullmatch(r"\W*verdict\W*(in)?correct\W*", reply.splitlines()[-1], re.I) for reply in replies]
    print(f"{metrics['judge/failed']:g} of 24 failed; {named} replies hold the word 'correct'")
    assert metrics["judge/failed"] + metrics["judge/judged"] == 24
    assert metrics["judge/judged"] <= 24 - ends.count(None)
    assert metrics["judge/failed"] >= 12 and named >= 6


def test_forced_verdicts_do_not_pass_calibration(live: Served) -> None:
    """Asked for JSON of the schema every reply has a verdict, and calibration finds that they mean nothing."""
    _, metrics, _ = calibrated(live, schemas=True)
    assert metrics["judge/judged"] >= 12
