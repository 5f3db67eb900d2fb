"""What agents may not see: hosts, addresses and texts, e.g. a benchmark's dataset pages, which hold its answers.

Results of a search that a rule matches are left out as if they did not exist; a call with such an address in its
arguments is refused as a tool_error before anything is requested; a page that holds a blocked text is not shown. Every
hit is counted by its rule, so that a report can tell how often an agent came near.

An address is compared without its scheme, user, port, leading "www.", closing "." of the host and fragment, in lower
case, with percent-escapes decoded. It is found wherever it stands in an argument: the address of an archive or a
redirector that carries a blocked one is blocked as well.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import translate
from urllib.parse import unquote

from pydantic import Field

from mgrpo.config.settings import Settings
from mgrpo.errors import ConfigError
from mgrpo.tools.base import Observation, Result

_ADDRESS = re.compile(
    r"(?:[/\\]{2,}|:[/\\])([^\s\"'<>]{1,512})"
)  # what stands behind a scheme; linear in any text
_DECODED = 3  # times that percent-escapes are decoded: an address may carry one that carries one


class BlockConfig(Settings):
    """What agents may not see."""

    hosts: list[str] = Field(default_factory=list)
    """Host names: each with all its subdomains."""
    urls: list[str] = Field(default_factory=list)
    """Patterns of addresses without scheme and "www.", with * and ?: "example.org/datasets/*"."""
    texts: list[str] = Field(default_factory=list)
    """Texts that no result, page or address may hold: names of data sets, canary strings. Case and the amount of white
    space do not count."""


class BlockList:
    """The rules of a BlockConfig, and how often each has matched. Use from one thread."""

    def __init__(self, config: BlockConfig) -> None:
        """Raises ConfigError for a rule that is empty or would block everything."""
        for field, rules in (("hosts", config.hosts), ("urls", config.urls), ("texts", config.texts)):
            for rule in rules:
                if not rule.strip(" *./"):
                    raise ConfigError(f"blocked.{field}: {rule!r} would block everything")
        self._hosts = {rule: _host(_plain(rule).removeprefix("*.")) for rule in config.hosts}
        self._urls = {rule: re.compile(translate(_address(_plain(rule)))) for rule in config.urls}
        self._texts = {rule: _spaced(rule) for rule in config.texts}
        self.hits: Counter[str] = Counter()
        """Rule -> results left out and calls refused because of it."""

    def rule_of_url(self, url: str) -> str | None:
        """The rule that blocks an address, or a text with addresses in it; None: none does."""
        return next((rule for found in _addresses(url) if (rule := self._blocks(found))), None)

    def rule_of_text(self, text: str) -> str | None:
        """The rule that blocks a text because of what it says."""
        if not self._texts:
            return None
        spaced = _spaced(text)
        return next((rule for rule, blocked in self._texts.items() if blocked in spaced), None)

    def refuses(self, arguments: Mapping[str, object]) -> bool:
        """Whether a call with these arguments is refused, which is counted."""
        return self._counted(next(filter(None, map(self.rule_of_url, _strings(arguments))), None))

    def filtered(self, seen: Observation) -> Observation:
        """What an agent may see of an observation: a search without the results that are blocked, anything else whole
        or, where it holds a blocked text, a tool_error."""
        if seen.results:
            kept = [result for result in seen.results if not self._counted(self._rule_of_result(result))]
            if len(kept) == len(seen.results):
                return seen
            left_out = seen.blocked + len(seen.results) - len(kept)
            return Observation.of_results(kept, seen.source, seen.seconds, left_out)
        if self._counted(self.rule_of_text(seen.text)):
            return refusal(seen)
        links = tuple(link for link in seen.links if self.rule_of_url(link) is None)
        return seen if links == seen.links else dataclasses.replace(seen, links=links)

    def _rule_of_result(self, result: Result) -> str | None:
        return self.rule_of_url(result.url) or self.rule_of_text(
            f"{result.title}\n{result.snippet}\n{result.url}"
        )

    def _blocks(self, address: str) -> str | None:
        host = _host(address)
        for rule, blocked in self._hosts.items():
            if host == blocked or host.endswith(f".{blocked}"):
                return rule
        plain = _address(address)
        for rule, pattern in self._urls.items():
            if pattern.match(plain):
                return rule
        return self.rule_of_text(plain)

    def _counted(self, rule: str | None) -> bool:
        if rule is not None:
            self.hits[rule] += 1
        return rule is not None


def refusal(seen: Observation | None = None) -> Observation:
    """What an agent reads in place of what is blocked."""
    source, seconds = (seen.source, seen.seconds) if seen else ("live", 0.0)
    words = "This address is blocked. Use another one."
    return Observation(words, status="tool_error", source=source, seconds=seconds, blocked=1)


def _strings(tree: object) -> Iterator[str]:
    """Every text in a tree of tables and lists, keys too."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for key, part in tree.items():
            yield from _strings(key)
            yield from _strings(part)
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _strings(part)


def _addresses(text: str) -> Iterator[str]:
    """Every address in a text, from behind its scheme on; the whole of a text that may be one without a scheme."""
    for _ in range(_DECODED):
        plain = _plain(text)
        if not re.search(r"\s", plain) and "." in re.split(r"[/?#]", plain, maxsplit=1)[0].strip("."):
            yield plain
        at = 0
        while found := _ADDRESS.search(plain, at):
            yield found[1]
            at = found.start(1)  # an address may stand in an address
        decoded = unquote(text)
        if decoded == text:
            return
        text = decoded


def _plain(text: str) -> str:
    """Lower case, with full-width letters and dots as plain ones."""
    return unicodedata.normalize("NFKC", text).strip().lower()


def _host(address: str) -> str:
    """The host of an address: "https://user@www.example.org.:80/a" -> "example.org"."""
    host = re.split(r"[/\\?#]", re.sub(r"^(?:[a-z][a-z0-9+.-]*:)?[/\\]+", "", address), maxsplit=1)[0]
    return host.rpartition("@")[2].partition(":")[0].strip(".").removeprefix("www.")


def _address(address: str) -> str:
    """Host and path of an address, as patterns are compared with: "https://www.example.org/a#b" -> "example.org/a"."""
    bare = re.sub(r"^(?:[a-z][a-z0-9+.-]*:)?[/\\]+", "", address).partition("#")[0]
    cut = re.search(r"[/\\?]", bare)
    path = unquote(bare[cut.start() :]).replace("\\", "/") if cut else ""
    host = _host(bare) or bare[: cut.start() if cut else None]
    return (host + path).lower()


def _spaced(text: str) -> str:
    return " ".join(_plain(text).split())
