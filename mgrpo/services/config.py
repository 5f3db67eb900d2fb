"""The settings of one service outside the run: a search, a reader, a judge, a corpus on another server."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from mgrpo.config.settings import MAX_SECONDS, Options, Settings

OWN_FIELDS = frozenset({"model", "messages", "temperature", "max_tokens", "response_format", "stream", "n"})
"""Of a chat request: written by ChatService itself, so that `extra` cannot contradict the settings."""


class ServiceConfig(Settings):
    """How a service is reached and how long it is waited for. Everything in seconds."""

    url: str
    """Where it answers, e.g. "https://google.serper.dev" or "http://10.0.0.5:8000". A path in it is kept."""
    key_env: str | None = None
    """Name of the environment variable that holds the key. The key itself is in no config, log or record. Unset: the
    service needs none."""
    timeout: float = Field(30.0, gt=0, le=MAX_SECONDS)
    """Of one attempt at a request, its whole answer included."""
    attempts: int = Field(5, ge=1, le=100)
    """At one request, before it counts as failed; so many failures in a row (two at least), of
    whatever requests, are an outage."""
    backoff: float = Field(0.5, ge=0, le=3600)
    """Before the second attempt; doubles with each, up to 30 s, by a random factor of 0.5 to 1.5. Where the service
    gives a longer time (Retry-After), that is kept."""
    concurrency: int = Field(8, ge=1, le=4096)
    """Requests under way at once, of each rollout worker."""
    max_outage: float = Field(600.0, gt=0, le=MAX_SECONDS)
    """How long the service may be down before the run ends. Until then rollouts wait, and their deadlines with them."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Further headers of every request. They are no place for keys: a run's config is written to its folder."""

    @field_validator("url")
    @classmethod
    def _an_address(cls, url: str) -> str:
        scheme, _, rest = url.partition("://")
        if scheme not in ("http", "https") or not rest.strip("/") or any(c in url for c in "?# \t\r\n"):
            raise ValueError(f"url {url!r}: expected http://host:port or https://host, with a path or none")
        if "@" in rest.partition("/")[0]:
            raise ValueError(
                "url: a name and password in it would be written to the run's folder; use key_env"
            )
        return url.rstrip("/")

    @field_validator("key_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        return name if name is None else variable_name(name)

    @field_validator("headers")
    @classmethod
    def _no_keys(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            if name.lower() in ("authorization", "proxy-authorization", "cookie", "x-api-key"):
                raise ValueError(f"headers: {name} would stand in the run's folder; use key_env")
            if not (name.isascii() and value.isascii() and value.isprintable()) or not name.strip():
                raise ValueError(f"headers: {name!r} is no header that HTTP can carry")
        return headers


class ChatServiceConfig(ServiceConfig):
    """A model behind the OpenAI API: a judge, or a user that is simulated."""

    model: str
    """As the server calls it."""
    temperature: float = Field(0.0, ge=0, le=10)
    """Of its sampling."""
    max_tokens: int = Field(512, ge=1)
    """Of one answer."""
    extra: Options = Field(default_factory=dict)
    """Further fields of the request's body, e.g. { top_p = 0.95, seed = 1 }."""

    @field_validator("extra")
    @classmethod
    def _no_own_fields(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(OWN_FIELDS & set(extra)):
            raise ValueError(f"extra: {', '.join(taken)} cannot be set here")
        return extra


def variable_name(name: str) -> str:
    """A `key_env` that names an environment variable. Raises ValueError, without the value: who mistakes the field
    writes the key itself there."""
    if not name.isidentifier():
        raise ValueError("key_env: expected the name of an environment variable, not a key")
    return name
