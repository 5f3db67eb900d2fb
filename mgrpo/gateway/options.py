"""[task.options.gateway]: how programs reach their policies, and what of their requests is taken."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mgrpo.config.settings import Settings


class GatewayOptions(Settings):
    """The gateway of a rollout worker."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than loopback lets other machines in, each request with its rollout's token."""
    port: int = Field(0, ge=0, le=65535)
    """0: a free one, which several rollout workers on one machine need: a port is one worker's."""
    advertise: str | None = None
    """Host name or address under which other machines reach `host`, where that is 0.0.0.0 or behind a NAT."""
    history: Literal["exact", "keep", "fork"] = "exact"
    """What becomes of a request whose history is not what was said. exact: refused (409). keep: the conversation at its
    place goes on from what was sampled, whatever the program made of it, and is counted. fork: a new segment begins
    with the history as the program has it; all segments of an invocation share its one vote. Of main every history is.
    Of a sub-agent one is that begins with the same first messages and has replies, or ends with its last question and
    reply; any other, a summary alone too, opens the next invocation, unless the request names one by its number."""
    thoughts: Literal["keep", "fork"] = "keep"
    """What becomes of thoughts that a program leaves out of its history. keep: the policy still sees them. fork: a new
    segment begins without them."""
    sampling: Literal["override", "refuse"] = "override"
    """What becomes of settings that would sample from another distribution than the one that is trained (temperature,
    top_p, penalties, logit_bias, a forced tool, response_format). override: the run's own are taken, and it is counted.
    refuse: 400. n above 1 is always refused."""
    tool_parser: Literal["hermes", "server"] = "hermes"
    """Who makes tool calls of what was sampled: "hermes" reads <tool_call>{"name", "arguments"}</tool_call>; "server"
    asks the role's inference server for its own parser (vLLM, started with --tool-call-parser)."""
    turn_tokens: int = Field(1024, ge=1)
    """Most tokens of a turn whose request names no bound; a turn never outgrows agents.<role>.max_length."""
    turns: int = Field(256, ge=1)
    """Turns of one rollout, all its agents together; more are refused (409)."""
    invocations: int = Field(64, ge=1)
    """Conversations of one rollout, all its roles together; more are refused (409)."""
    concurrent_turns: int = Field(64, ge=1)
    """Turns of one rollout at the same time; more are refused (429)."""
    body_mb: float = Field(32.0, gt=0)
    """Largest body of a request, in MB (413)."""
    idle_seconds: float = Field(120.0, gt=0)
    """Seconds that a connection may take to send a request, and to read its answer."""
