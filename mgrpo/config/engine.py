"""What samples one agent's tokens: agents.<role>.engine = { type = ..., ... }, a table whose keys depend on its type.

Code that serves every type asks the properties of EngineSettings and no type's own settings.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from mgrpo.config.policy import Device, Precision
from mgrpo.config.settings import MAX_SECONDS, Options, Settings

OnUpdate = Literal["keep", "recompute"]
"""What becomes of the keys and values of a request during which new weights arrive."""


class EngineSettings(Settings):
    """What every type of engine is asked."""

    @model_validator(mode="before")
    @classmethod
    def _kind_is_type(cls, value: object) -> object:
        if isinstance(value, dict) and "kind" in value:
            raise ValueError(f"kind is called type: type = {json.dumps(value['kind'], default=str)}")
        return value

    @model_serializer(mode="wrap")
    def _shared_is_said_once(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A run's copy of its config holds the settings of a shared engine where they are said."""
        if self.engine_of is not None:
            return {"shared_with": self.engine_of}
        tree: dict[str, Any] = dump(self)
        return tree

    @property
    def running_servers(self) -> tuple[str, ...]:
        """Addresses of servers that run already."""
        return ()

    @property
    def started_servers(self) -> int:
        """Servers that the launcher starts."""
        return 0

    @property
    def started_device(self) -> Device:
        """Where a process of this run computes that samples: a rollout worker, or a server that it starts."""
        return "cpu"

    @property
    def worker_device(self) -> Device:
        """What a rollout worker itself needs."""
        return "cpu"

    @property
    def unused_without_lag(self) -> str | None:
        """The setting, if any, that acts on rollouts during which weights change."""
        field = type(self).model_fields.get("on_update")
        changed = field is not None and getattr(self, "on_update") != field.default  # noqa: B009 - not of every type
        return "on_update" if changed else None

    @property
    def adapter_only(self) -> bool:
        """The trainer publishes its LoRA adapter alone, so one base model may serve several policies."""
        return False

    @property
    def direct(self) -> bool:
        """The trainer itself sends its weights to the servers; workers learn their labels alone."""
        return False

    @property
    def probed(self) -> bool:
        """Whether engines of this type compare what they compute with the trainer's probe after each update."""
        return False

    @property
    def adapter_setting(self) -> str:
        """The setting that makes it so; "" where the type has none."""
        return ""

    @property
    def engine_of(self) -> str | None:
        """The agent whose engine, and so whose servers, this one shares."""
        return None

    @property
    def weights_dtype(self) -> Precision:
        """What published weights are rounded to before they leave the trainer."""
        return "float32"


class HfEngineConfig(EngineSettings):
    """The model itself, inside each rollout worker. New weights arrive over the link from the trainer."""

    type: Literal["hf"] = "hf"
    device: Device = "cpu"
    """Where it computes."""
    dtype: Precision = "float32"
    """What it computes in."""
    on_update: OnUpdate = "recompute"
    """A request during which new weights arrive goes on with its keys and values (keep: free, but what it samples from
    then on comes from a mixture of both weights), or is fed again first (recompute: each token's log-prob is exactly
    that of its version). It acts where rollouts run across updates: trainer.max_lag >= 1."""
    adapters: bool = False
    """The policy's LoRA adapter arrives alone (needs policy.lora.rank); the rollout worker takes the base model from
    agents.<role>.model. Agents of the same model with the same settings here share one base in memory."""
    shared_with: str | None = None
    """Another agent, whose engine samples for this one too: engine = { shared_with = "main" }. All settings are there.
    Needs adapters, and the same model."""

    @property
    def started_device(self) -> Device:
        return self.device

    @property
    def worker_device(self) -> Device:
        return self.device

    @property
    def adapter_only(self) -> bool:
        return self.adapters

    @property
    def probed(self) -> bool:
        return self.adapters  # the base is the worker's own copy

    @property
    def adapter_setting(self) -> str:
        return "adapters = true"

    @property
    def engine_of(self) -> str | None:
        return self.shared_with

    @property
    def weights_dtype(self) -> Precision:
        return "float32" if self.adapter_only else self.dtype


class ServerEngineConfig(EngineSettings):
    """What engines over HTTP have in common."""

    urls: tuple[str, ...] = ()
    folder: str | None = None
    """Folder for the weights that trainer and servers share. Unset: one in the run's folder."""
    timeout: float = Field(120.0, gt=0, le=MAX_SECONDS)
    """Seconds that one request to a server may take before it counts as failed."""

    _url_tuple = field_validator("urls", mode="before")(lambda v: tuple(v) if isinstance(v, list) else v)

    @property
    def probed(self) -> bool:
        return True

    @property
    def running_servers(self) -> tuple[str, ...]:
        return self.urls


class VllmEngineConfig(ServerEngineConfig):
    """One or more vLLM servers over HTTP."""

    type: Literal["vllm"] = "vllm"
    urls: tuple[str, ...] = ()
    """Servers that run already, e.g. ["http://10.0.0.3:8000"]. Empty: the launcher starts `replicas` of them."""
    replicas: int = Field(1, ge=1)
    """Servers that the launcher starts; requests go to the one with the fewest in flight."""
    sync: Literal["fs", "patch", "nccl", "gloo", "lora"] = "fs"
    """How new weights arrive. fs: a safetensors folder that the server reads again. patch: what changed, taken in place
    by a plug-in in the server. nccl: straight from the trainer's GPUs to the server's, by the same plug-in (not yet run
    on GPUs). gloo: the same between processes on CPUs. lora: a new adapter folder a version."""
    device: Device = "cpu"
    """Where servers that the launcher starts compute."""
    dtype: Precision = "float32"
    """What they compute in."""
    on_update: OnUpdate = "recompute"
    """What the server does with requests that run while new weights arrive. recompute: their keys and values are
    dropped and computed again, so each token's log-prob is exactly that of its version. keep: they go on with theirs,
    which costs nothing; what they sample from then on comes from a mixture of both weights. With sync "lora" there is
    nothing to choose: a request is answered to its end by the adapter it began with."""
    python: str = ".venv-vllm/bin/python"
    """The interpreter of the environment that has vLLM, for servers that the launcher starts."""
    arguments: tuple[str, ...] = ()
    """Further arguments of such a server, e.g. ["--gpu-memory-utilization", "0.8"]."""
    shared_with: str | None = None
    """Another agent, whose servers sample for this one too: engine = { shared_with = "main" }. All settings are there.
    Needs sync "lora", and the same model."""

    _argument_tuple = field_validator("arguments", mode="before")(
        lambda v: tuple(v) if isinstance(v, list) else v
    )

    @model_validator(mode="after")
    def _settings_act(self) -> VllmEngineConfig:
        if self.urls and self.replicas != 1:
            raise ValueError(f"replicas={self.replicas} has no effect beside urls")
        if self.sync == "lora" and self.on_update != "recompute":
            raise ValueError(
                f'on_update={self.on_update!r} has no effect with sync "lora": a request is answered to its end by the '
                "adapter it began with"
            )
        if self.sync == "nccl" and self.device == "cpu":
            raise ValueError('sync "nccl" needs device "cuda"')
        if self.sync == "gloo" and self.device != "cpu":
            raise ValueError(f'sync "gloo" needs device "cpu", got {self.device!r}; use "nccl"')
        return self

    @property
    def started_servers(self) -> int:
        return 0 if self.urls or self.shared_with else self.replicas

    @property
    def started_device(self) -> Device:
        return "cpu" if self.urls else self.device

    @property
    def adapter_only(self) -> bool:
        return self.sync == "lora"

    @property
    def direct(self) -> bool:
        return self.sync in ("nccl", "gloo")

    @property
    def adapter_setting(self) -> str:
        return 'sync = "lora"'

    @property
    def engine_of(self) -> str | None:
        return self.shared_with

    @property
    def weights_dtype(self) -> Precision:
        return (
            "float32" if self.adapter_only else self.dtype
        )  # adapters are small, and added in the server's dtype


class SglangEngineConfig(ServerEngineConfig):
    """One or more SGLang servers over HTTP, which run already. New weights arrive through a safetensors folder that the
    servers read again."""

    type: Literal["sglang"] = "sglang"
    urls: tuple[str, ...] = Field(min_length=1)
    """Their addresses, e.g. ["http://10.0.0.3:30000"]."""
    on_update: OnUpdate = "recompute"
    """recompute only: an update breaks off what is running, and its client asks for the rest with the tokens so far as
    part of the prompt, which the new weights read afresh. SGLang labels a whole answer with one version, so it cannot
    keep requests across an update without mislabelling their older tokens."""

    @model_validator(mode="after")
    def _updates_can_be_labelled(self) -> SglangEngineConfig:
        if self.on_update != "recompute":
            raise ValueError(
                f'on_update={self.on_update!r}: SGLang labels a whole answer with one version; expected "recompute"'
            )
        return self


class CustomEngineConfig(EngineSettings):
    """An engine of another package. Cluster plans give its workers no GPU."""

    type: str
    """The name that an installed package gives it, or "package.module:Class"."""
    options: Options = Field(default_factory=dict)
    """Settings of the engine itself; each engine checks its own."""

    @model_validator(mode="before")
    @classmethod
    def _settings_are_options(cls, value: object) -> object:
        if isinstance(value, dict) and (other := sorted(set(value) - {"type", "options", "kind"})):
            raise ValueError(
                f"type {value['type']!r} is none of {', '.join(BUILT_IN)}; an engine of another package takes its "
                f"settings as options = {{...}}, got {', '.join(other)}"
            )
        return value


BUILT_IN = ("hf", "vllm", "sglang")


def _tag(value: object) -> str:
    """In parentheses, so that errors leave it out of the field's name."""
    name = value.get("type", "hf") if isinstance(value, dict) else getattr(value, "type", None)
    return f"({name})" if name in BUILT_IN else "(custom)"


EngineConfig = Annotated[
    Annotated[HfEngineConfig, Tag("(hf)")]
    | Annotated[VllmEngineConfig, Tag("(vllm)")]
    | Annotated[SglangEngineConfig, Tag("(sglang)")]
    | Annotated[CustomEngineConfig, Tag("(custom)")],
    Discriminator(_tag),
]
