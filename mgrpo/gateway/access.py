"""What a program needs to reach the agents of its rollout: a base URL, and the key that opens it.

    async def run(self, question, base_url):                       # base_url: Access, which is a str
        client = AsyncOpenAI(base_url=base_url, api_key=base_url.api_key)
        claude = AsyncAnthropic(base_url=base_url.anthropic_url, api_key=base_url.api_key)
        subprocess.run([...], env=os.environ | base_url.environment())

The agent is each request's `model`: the name of a role. Where a program cannot choose its model, for_agent() gives the
base URL of one role.
"""

from __future__ import annotations

from urllib.parse import quote

VERSION = "/v1"  # the last part of every base URL


class Access(str):
    """The base URL of one rollout, a text like any other, with what opens it. Its repr holds no key."""

    api_key: str
    """Of this rollout alone; as Bearer, or as x-api-key."""

    def __new__(cls, base_url: str, api_key: str) -> Access:
        """base_url: http://host:port/rollout/{id}/v1. Raises ValueError for one that does not end so."""
        if not base_url.endswith(VERSION):
            raise ValueError(f"base URL {base_url!r}: expected one that ends with {VERSION}")
        made = super().__new__(cls, base_url)
        made.api_key = api_key
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]  # for copy and pickle
        return str(self), self.api_key

    @property
    def root(self) -> str:
        """The base URL without its /v1: beside it stand /reward and /answer."""
        return str(self).removesuffix(VERSION)

    @property
    def anthropic_url(self) -> str:
        """The base URL of Anthropic's SDK, which writes /v1 itself."""
        return self.root

    @property
    def headers(self) -> dict[str, str]:
        """For a client without an SDK."""
        return {"Authorization": f"Bearer {self.api_key}"}

    def for_agent(self, role: str) -> Access:
        """The base URL of one role, whatever model its requests name."""
        return Access(f"{self.root}/agent/{quote(role, safe='')}{VERSION}", self.api_key)

    def environment(self) -> dict[str, str]:
        """The variables that SDKs read."""
        return {
            "OPENAI_BASE_URL": str(self),
            "OPENAI_API_KEY": self.api_key,
            "ANTHROPIC_BASE_URL": self.anthropic_url,
            "ANTHROPIC_API_KEY": self.api_key,
        }
