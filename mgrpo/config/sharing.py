"""Agents on one engine: what engine = { shared_with = "main" } stands for, and which agents may be served together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgrpo.config.run import AgentConfig

SHARED = ("hf", "vllm")  # types whose engines serve several policies


def with_shared_engines(tree: Any) -> Any:
    """The tree of a run with the other agent's whole table in the place of each engine = { shared_with = ROLE }. What
    is no tree of a run is left for the config to refuse. Raises ValueError."""
    agents = tree.get("agents") if isinstance(tree, dict) else None
    if not isinstance(agents, dict):
        return tree
    shared = {role: _shared_table(agents, role, table) for role, table in _guests(agents)}
    return {**tree, "agents": {r: a | {"engine": shared[r]} if r in shared else a for r, a in agents.items()}}


def _guests(agents: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Agents without an engine of their own, and what they say about it."""
    for role, agent in agents.items():
        table = agent.get("engine") if isinstance(agent, dict) else None
        if isinstance(table, dict) and table.get("shared_with") is not None:
            yield role, table


def _shared_table(agents: dict[str, Any], role: str, table: dict[str, Any]) -> dict[str, Any]:
    other = table["shared_with"]
    where = f"agents.{role}.engine.shared_with={other!r}"
    host = agents.get(other) if isinstance(other, str) else None
    if not isinstance(host, dict) or other in dict(_guests(agents)) or host.get("shares") is not None:
        raise ValueError(f"{where}: expected another agent with an engine of its own")
    theirs = host.get("engine", {})
    if not isinstance(theirs, dict):
        return table
    kind = theirs.get("type", "hf")
    if kind not in SHARED:
        raise ValueError(
            f"{where}: an engine of type {kind!r} gets the whole weights of one policy; expected "
            f"{' or '.join(SHARED)}"
        )
    settings = {"type": "hf", **theirs, "shared_with": other}
    if extra := sorted(key for key in table if settings.get(key) != table[key]):
        raise ValueError(
            f"agents.{role}.engine.{extra[0]} has no effect beside shared_with={other!r}: set it in "
            f"agents.{other}.engine"
        )
    return settings


def check_engines(agents: Mapping[str, AgentConfig]) -> None:
    """Raise ValueError where agents cannot be served as they are meant to be: an engine holds one policy's whole
    weights, or adapters of any number of policies on one base model."""
    users: dict[str, str] = {}
    for role, agent in agents.items():
        if agent.shares is None:
            _check_adapters(role, agent)
            _check_direct(role, agent)
            if agent.engine.engine_of is not None:
                _check_guest(agents, role, agent.engine.engine_of)
            _check_urls(agents, role, users)


def _check_adapters(role: str, agent: AgentConfig) -> None:
    engine = agent.engine
    if not engine.adapter_only:
        return
    if not agent.policy.lora.rank:
        raise ValueError(
            f"agents.{role}.engine.{engine.adapter_setting} needs agents.{role}.policy.lora.rank of 1 or more"
        )
    if fused := [target for target in agent.policy.lora.targets if "." in target]:
        raise ValueError(
            f"agents.{role}.engine.{engine.adapter_setting} cannot carry the adapters of experts, "
            f"agents.{role}.policy.lora.targets has {fused[0]!r}; take an engine that gets whole weights"
        )
    if engine.type == "hf" and agent.model is None:
        raise ValueError(
            f"agents.{role}.engine.{engine.adapter_setting} needs agents.{role}.model: the adapter alone is sent to "
            "the rollout workers, which take the base model from there"
        )


def _check_direct(role: str, agent: AgentConfig) -> None:
    mesh = agent.policy.mesh
    if agent.engine.direct and (mesh.tp, mesh.ep, mesh.cp, mesh.replicate) != (1, 1, 1, 1):
        raise ValueError(
            f"agents.{role}.policy.mesh tp={mesh.tp}, ep={mesh.ep}, cp={mesh.cp}, replicate={mesh.replicate}: ranks "
            "send weights straight to servers only where dp alone divides them; use "
            f'agents.{role}.engine.sync "fs" or "patch"'
        )


def _check_guest(agents: Mapping[str, AgentConfig], role: str, other: str) -> None:
    where, host = f"agents.{role}.engine.shared_with={other!r}", agents.get(other)
    own = agents[role].engine.model_copy(update={"shared_with": None})
    if host is None or own != host.engine:
        raise ValueError(f"{where}: its settings are not those of agents.{other}.engine")
    if not own.adapter_only:
        raise ValueError(
            f"{where}: two policies with whole weights cannot be on one engine; set "
            f"agents.{other}.engine.{own.adapter_setting}, and policy.lora.rank of both"
        )
    _check_base(agents, role, other, where)


def _check_base(agents: Mapping[str, AgentConfig], role: str, other: str, where: str) -> None:
    mine, theirs = agents[role].model, agents[other].model
    if mine != theirs:
        raise ValueError(
            f"{where}: agents.{role}.model={mine!r} and agents.{other}.model={theirs!r} differ; adapters on one engine "
            "need the same base model"
        )


def _check_urls(agents: Mapping[str, AgentConfig], role: str, users: dict[str, str]) -> None:
    """users: address -> the agent that has named it; extended."""
    engine = agents[role].engine
    urls, where = engine.running_servers, f"agents.{role}.engine.urls"
    for url in urls:
        if urls.count(url) > 1:
            raise ValueError(f"{where}: {url} stands there {urls.count(url)} times")
        other = users.setdefault(url.rstrip("/"), role)
        if other == role:
            continue
        if not (engine.adapter_only and agents[other].engine.adapter_only):
            raise ValueError(
                f"{where}: {url} already serves the policy of {other!r}; only policies with "
                f'engine.sync = "lora" can share a server'
            )
        _check_base(agents, role, other, f"{where}: {url}")
