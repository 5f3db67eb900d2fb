"""Asking a model for something that its reply may not hold: what judge.py and expert.py share.

    prompt -> reply -> parser -> a value
                         |
                         +-- nothing: asked again, in fewer words, up to `asks` times; then NoVerdictError

A reply that cannot be read is a failure of the judge, not of the candidate: NoVerdictError is an infrastructure
failure, so the rollout leaves its group, and is never scored 0. Its text holds nothing of the reply, which may quote a
question that must not be published.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import Field, field_validator

from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.scoring.text import check_template
from mgrpo.services.config import ChatServiceConfig
from mgrpo.tools.base import Source

if TYPE_CHECKING:
    from mgrpo.services.cassette import Cassette

T = TypeVar("T")


class Replied(Protocol):
    """What a chat service gives: see mgrpo/services/client.py, Reply."""

    @property
    def value(self) -> str: ...

    @property
    def source(self) -> Source: ...

    @property
    def seconds(self) -> float: ...


class ChatModel(Protocol):
    """The part of ChatService (mgrpo/services/openai.py) that is used here."""

    async def complete(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        schema: Mapping[str, object] | None = None,
        pure: bool = True,
        occurrence: str = "",
    ) -> Replied: ...

    async def close(self) -> None: ...


class AskConfig(ChatServiceConfig):
    """A model that judges, and how it is asked."""

    asks: int = Field(3, ge=1, le=20)
    """How often it is asked, at most, while its replies cannot be read; beyond that the rollout fails, unscored."""
    candidate_chars: int = Field(4000, ge=16)
    """Most characters that it sees of what a candidate wrote."""
    template: str | None = None
    """A prompt of one's own; how the reply must look is added to it. Unset: the built-in one."""
    calibration: float = Field(0.9, ge=0, le=1)
    """Least share of the calibration list that it must get right before the first step; 0: it is not asked."""
    calibration_file: str | None = None
    """Further cases of the calibration, one JSON object a line."""
    fields: ClassVar[tuple[str, ...]] = ()
    """Names of the parts that a template must hold in braces."""

    @field_validator("template")
    @classmethod
    def _whole(cls, template: str | None) -> str | None:
        if template is not None:
            try:
                check_template("template", template, cls.fields)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return template


class NoVerdictError(InfrastructureError):
    """A judge that answers, but not with what it was asked for."""


@dataclass(frozen=True, slots=True)
class Form(Generic[T]):
    """How a reply must look. full: in words, put behind the prompt, with a JSON schema for servers that take one;
    brief: for the further times, without a schema. parse: reply -> value, or None for nothing that counts."""

    full: str
    brief: str
    schema: Mapping[str, object]
    parse: Callable[[str], T | None]


@dataclass(frozen=True, slots=True)
class Found(Generic[T]):
    """A value that a reply held, and that reply. seconds: of all the times it was asked."""

    value: T
    text: str
    source: Source
    seconds: float


@dataclass(slots=True)
class Tally:
    """What became of the calls so far."""

    skipped: int = 0
    """Nothing to judge: no call was made."""
    judged: int = 0
    asked_again: int = 0
    """Replies that could not be read, and were asked for again."""
    failed: int = 0
    """Given up after `asks` replies of that kind."""

    def metrics(self, name: str) -> dict[str, float]:
        """Full name -> count."""
        return {
            f"{name}/skipped": float(self.skipped),
            f"{name}/judged": float(self.judged),
            f"{name}/asked_again": float(self.asked_again),
            f"{name}/failed": float(self.failed),
        }


class Asker:
    """One model, asked as its config says. Use from one event loop."""

    def __init__(self, name: str, config: AskConfig, service: ChatModel) -> None:
        self.name, self.config, self.tally = name, config, Tally()
        self._service = service

    async def ask(self, prompt: str, form: Form[T], occurrence: str = "") -> Found[T]:
        """The value that a reply holds. The first time is a pure function of the prompt, so that a cassette may answer
        it for all; the further times are not, and `occurrence` names whose they are (empty: they are numbered). Raises
        NoVerdictError, and what the service raises."""
        seconds, text = 0.0, ""
        for number in range(self.config.asks):
            first = number == 0
            reply = await self._service.complete(
                [{"role": "user", "content": f"{prompt}\n{form.full if first else form.brief}"}],
                schema=form.schema if first else None,
                pure=first,
                occurrence=f"{occurrence}/{number}" if occurrence and not first else "",
            )
            seconds, text = seconds + reply.seconds, reply.value
            value = form.parse(text)
            if value is not None:
                self.tally.judged += 1
                return Found(value, text, reply.source, seconds)
            self.tally.asked_again += number + 1 < self.config.asks
        self.tally.failed += 1
        raise NoVerdictError(
            f"{self.name} (model {self.config.model!r}) gave nothing that can be read in {self.config.asks} "
            f"replies, the last of {len(text)} characters"
        )

    def digest(self, *texts: str) -> str:
        """First 16 hexadecimal digits of a SHA-256 over the model, its sampling and `texts` (prompts); another address
        of the same model has the same."""
        config = self.config
        kept: list[object] = [config.model, config.temperature, config.max_tokens, config.extra]
        kept += [config.asks, config.candidate_chars, *texts]
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode("ascii")).hexdigest()[:16]

    async def close(self) -> None:
        await self._service.close()


def object_schema(**properties: Mapping[str, object]) -> dict[str, object]:
    """JSON schema of an object with these properties, all required, and no others."""
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def open_service(name: str, config: AskConfig, cassette: Cassette | None) -> ChatModel:
    """The model of a config over HTTP. Raises ConfigError."""
    from mgrpo.services.openai import ChatService

    return ChatService(name, config, cassette)


async def calibrated(asker: Asker, calls: Sequence[Coroutine[Any, Any, T]]) -> list[T | None]:
    """What each call gave, None where the model gave nothing usable. Raises ConfigError where it answered none of them,
    and whatever is no infrastructure failure."""
    ended = await asyncio.gather(*calls, return_exceptions=True)  # all end before any error is raised
    given: list[T | None] = []
    unanswered: list[InfrastructureError] = []
    for one in ended:
        if isinstance(one, InfrastructureError):
            given.append(None)
            unanswered += [] if isinstance(one, NoVerdictError) else [one]
        elif isinstance(one, BaseException):
            raise one
        else:
            given.append(one)
    if len(unanswered) == len(ended):
        raise ConfigError(f"{asker.name} could not be calibrated: {unanswered[0]}") from unanswered[0]
    return given


def check_agreement(asker: Asker, agreed: int, of: int, wrong: Sequence[str]) -> float:
    """The share agreed / of. Raises ConfigError below the config's bound, with the first few of `wrong`."""
    share = agreed / of
    if share < asker.config.calibration:
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ConfigError(
            f"{asker.name} (model {asker.config.model!r}) agrees with {agreed} of {of} cases of its calibration "
            f"({share:.3f}), expected at least calibration={asker.config.calibration:g}: {shown}"
        )
    return share
