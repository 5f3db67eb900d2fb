"""[task.options] of the task "research". Unknown keys and values out of bounds are refused by name."""

from __future__ import annotations

import datetime
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from mgrpo.config.settings import Options, Settings, first_problem
from mgrpo.tools.calls import Format


class AgentOptions(Settings):
    """What one role may do and is asked to do."""

    tools: list[str] | None = None
    """Names of its tools. Unset: all of them for a sub-agent and for a main agent that is alone, none for a main agent
    with sub-agents."""
    about: str = "An agent with tools of its own that works on one task and reports what it has found."
    """Of a sub-agent, for the main agent that chooses among them."""
    prompt: str | None = None
    """Its system prompt. {date}, {tools} and {format} are replaced; unset: prompts.py."""
    prompt_file: str | None = None
    """The same from a text file."""

    @model_validator(mode="after")
    def _one_prompt(self) -> AgentOptions:
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("prompt and prompt_file exclude each other")
        return self


class LimitOptions(Settings):
    """Bounds of a rollout. What an agent may say and see in all is agents.<role>.max_length."""

    turns: int = Field(20, ge=2)
    """Turns of one agent, the last of which must be its answer."""
    turn_tokens: int = Field(1024, ge=4)
    """Tokens of one turn."""
    answer_tokens: int = Field(256, ge=4)
    """Tokens that are kept free for the answer turn; at most turn_tokens."""
    calls: int = Field(8, ge=1)
    """Tool calls of one turn; further ones are answered with an error."""
    asks: int = Field(8, ge=1)
    """Tasks that the main agent may give in one rollout, over all sub-agent roles."""
    observation_chars: int = Field(8000, ge=100)
    """Characters of one tool's result; the rest is cut, with a mark."""
    observation_tokens: int = Field(4096, ge=64)
    """Tokens of all results of one turn."""
    report_chars: int = Field(4000, ge=20)
    """Characters of a task, a report and an answer."""

    @model_validator(mode="after")
    def _answer_is_a_turn(self) -> LimitOptions:
        if self.answer_tokens > self.turn_tokens:
            raise ValueError(
                f"answer_tokens={self.answer_tokens} must be at most turn_tokens={self.turn_tokens}"
            )
        return self


class ScoreOptions(Settings):
    """How answers and reports are scored (mgrpo/scoring)."""

    rule: str = "gaia"
    """gaia, exact, f1, sub_exact, number, list, or "package.module:function"."""
    judge: Options | None = None
    """A model behind an OpenAI-compatible service judges what the rule does not accept: url, model, key_env, ... Unset:
    the rule alone decides."""
    expert: Literal["path", "judge"] | None = None
    """A sub-agent's own score. path: gold values of the question that it reports and has seen on a page. judge: a model
    grades the report by a rubric, without the gold answer. Unset: sub-agents have no expert score."""
    expert_judge: Options | None = None
    """The service of expert "judge"; with "path", that of questions without a gold path. Unset: that of `judge`."""
    format: Literal["share", "strict"] = "share"
    """share: the share of an agent's turns that were well-formed. strict: 1 where all were, else 0. Both: 0 without an
    answer or report."""


class CassetteOptions(Settings):
    """Recorded answers of services (mgrpo/services/cassette.py)."""

    path: str
    """The SQLite file; all rollout workers share it."""
    mode: Literal["off", "record", "cached", "replay"] = "cached"
    """record: ask and record. cached: ask only for what is not recorded. replay: ask nothing; what is not recorded ends
    the run."""


class ResearchOptions(Settings):
    """[task.options] of the task research."""

    questions: Options = Field(default_factory=dict)
    """Where questions come from: source, path, where, ... (mgrpo/benchmarks)."""
    tools: dict[str, Options] = Field(default_factory=dict)
    """One table a tool or service: type and its settings (mgrpo/tools). Empty: closed book."""
    blocked: Options | None = None
    """What no agent may see: hosts, urls, texts (mgrpo/tools/blocklist.py)."""
    agents: dict[str, AgentOptions] = Field(default_factory=dict)
    """One table a role."""
    single: AgentOptions | None = None
    """Of main in a run of agents.main alone, in the place of agents.main: the single agent that `mgrpo compare` puts
    beside the team."""
    score: ScoreOptions = ScoreOptions()
    limits: LimitOptions = LimitOptions()
    format: Format = "hermes"
    """How tool calls are written: hermes (<tool_call> tags) or json (bare objects)."""
    tools_in: Literal["prompt", "template"] = "prompt"
    """prompt: tools are described in the system prompt, and results are messages of the user. template: both are left
    to the models' chat template (`tools`, role "tool"), which must know them."""
    template: Options = Field(default_factory=dict)
    """Settings of the models' chat template, e.g. { enable_thinking = false }."""
    date: str | None = None
    """The day that agents are told, e.g. "2025-11-17". Never the clock's: a rollout that is played again must read the
    same prompt."""
    cassette: CassetteOptions | None = None
    random_search: bool = False
    """Control: every search (a tool with an argument `query`) is made with another question's text in place of the
    query."""

    @field_validator("date")
    @classmethod
    def _is_a_day(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                datetime.date.fromisoformat(value)
            except ValueError:
                raise ValueError(f"date={value!r}, expected a day such as '2025-11-17'") from None
        return value


def read_options(options: object) -> ResearchOptions:
    """Raises ValueError naming the key."""
    try:
        return ResearchOptions.model_validate(options)
    except ValidationError as error:
        raise ValueError(first_problem(error, "options")) from None
