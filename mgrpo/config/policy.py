"""How one agent's policy is held and computed by its trainer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from mgrpo.config.settings import Settings

Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]
EXTERNAL = "external"  # the policy.trainer that is a program of the user's


class LoraConfig(Settings):
    """Low-rank adapters (peft): only they train; the base model is the reference policy of a KL term."""

    rank: int = Field(0, ge=0)
    """Rank of the adapters; 0 trains without any."""
    alpha: float = Field(32.0, gt=0)
    """The adapters' output is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Last parts of the names of the linear layers that get one. For a mixture of experts name its attention, e.g.
    ["q_proj", "k_proj", "v_proj", "o_proj"], its fused experts, ["experts.gate_up_proj", "experts.down_proj"], or both.
    Routers and shared experts cannot get one. Adapters of experts do not travel alone: they need an engine that takes
    whole weights."""

    @field_validator("targets", mode="before")
    @classmethod
    def _tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value  # TOML has no tuples


class MeshConfig(Settings):
    """What the ranks of one trainer divide among them: replicate x dp x cp x tp ranks, those of one tp group side by
    side, and the tp groups of one cp group likewise. What a model cannot be cut into is refused when it is loaded."""

    dp: int = Field(0, ge=0)
    """Ranks with micro-batches of their own, over which every weight is sharded (FSDP2). 0: as many as policy.ranks
    leaves for it."""
    tp: int = Field(1, ge=1)
    """Ranks that compute each micro-batch together, each with its part of the attention heads, the feed-forward blocks
    and the vocabulary, after the tensor-parallel plan that transformers has for the model."""
    ep: int = Field(1, ge=1)
    """Ranks that a mixture's experts are spread over, tokens being sent to them (all-to-all). They are those of dp, cp
    and tp: a multiple of tp that divides dp * cp * tp."""
    cp: int = Field(1, ge=1)
    """Ranks that divide each row of a micro-batch among them, for trajectories whose activations one does not hold.
    Every weight is sharded over them too. For models of plain attention."""
    replicate: int = Field(1, ge=1)
    """Copies of the sharded weights (HSDP): a weight is gathered within one copy, its gradient summed over all."""

    @property
    def same_rows(self) -> int:
        """Ranks, side by side, that compute one micro-batch together."""
        return self.cp * self.tp


class PolicyConfig(Settings):
    """How the trainer holds and computes one agent's policy."""

    trainer: str = "torch"
    """The backend: torch, the name that an installed package gives one, or "package.module:Class"; or external: a
    program of yours that takes part through mgrpo.feed (docs/embedding/feed.md)."""
    device: Device = "cpu"
    """Where the trainer computes."""
    dtype: Precision = "float32"
    """What the backbone computes in. The weights that are trained stay float32 either way: small updates to bfloat16
    weights are lost to rounding. Frozen matrices, embeddings and experts are kept in it."""
    head_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What hidden states and head weight are rounded to before they are multiplied; logits, loss and the gradient of
    the head weight are float32 either way. auto: as dtype. float32 on a GPU multiplies without its tensor cores."""
    attention: Literal["auto", "rows", "sdpa", "varlen", "flash"] = "auto"
    """rows: sequences of similar length share a forward. varlen: packed rows through torch's variable-length attention
    (a loop over sequences on the CPU). flash: packed rows through the package flash-attn. sdpa: padded rows. auto:
    flash where the package works, else varlen, on a GPU; rows on the CPU."""
    share_prefixes: bool = True
    """Compute once what several rows of a micro-batch begin with: the question of a group's rollouts, the system prompt
    and tools of a role's calls, the history of a fork. The gradient is the same. Where a model or the mesh cannot, each
    row is computed whole, and the trainer says why."""
    experts: Literal["auto", "grouped_mm", "batched_mm", "eager"] = "auto"
    """How a mixture of experts multiplies. grouped_mm: one grouped product a layer. batched_mm: a copy of the chosen
    expert for each token, for a handful of tokens. eager: one expert after the other. auto: grouped_mm, and eager where
    the architecture has nothing else."""
    aux_loss_coef: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the load-balancing loss of a mixture of experts, e.g. 1e-3; 0: none. It costs one more forward pass of
    each minibatch, over which the load is counted first (docs/models.md)."""
    routing_replay: bool = False
    """Send each token of a mixture of experts to the experts that the engine sent it to when it was sampled (rollout
    routing replay, arXiv:2510.11370). What the experts are weighted by is the trainer's, and has a gradient. The engine
    reports them with each turn: k bytes a token and layer, in the trajectory log too."""
    train_router: bool = True
    """false: the routers of a mixture of experts stay as they are. With adapters they do anyway."""
    compile: bool = False
    """Have torch.compile fuse what a decoder layer computes beside its matrix products. The first steps then take
    longer, for compiling. For dense models on one rank."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again in the backward pass."""
    activation_offload: bool = False
    """Keep what the backward pass needs in main memory; for a policy on a GPU."""
    last_layers: int = Field(0, ge=0)
    """Train only the last n decoder layers and the final norm; 0: everything."""
    lora: LoraConfig = LoraConfig()
    ranks: int = Field(1, ge=1)
    """Processes of this agent's trainer: the policy is sharded over them, the batch divided among them, as policy.mesh
    says. Not given, it is the product of mesh.replicate, mesh.dp, mesh.cp and mesh.tp."""
    mesh: MeshConfig = MeshConfig()

    @property
    def data_ranks(self) -> int:
        """Ranks with micro-batches of their own; each batch is computed by ranks / data_ranks of them together."""
        return self.ranks // self.mesh.same_rows

    @model_validator(mode="after")
    def _ranks_of_the_mesh(self) -> PolicyConfig:
        mesh, ranks = self.mesh, self.ranks
        product = mesh.replicate * max(1, mesh.dp) * mesh.cp * mesh.tp
        if "ranks" not in self.model_fields_set:
            object.__setattr__(self, "ranks", ranks := product)
        if ranks != product if mesh.dp else ranks % product:
            shape = f"replicate={mesh.replicate}{f' * dp={mesh.dp}' if mesh.dp else ''} * cp={mesh.cp} * tp={mesh.tp}"
            raise ValueError(
                f"ranks={ranks} should be {'' if mesh.dp else 'a multiple of '}mesh {shape} = {product}"
            )
        if mesh.cp > 1 and self.attention not in ("auto", "sdpa"):
            raise ValueError(
                f'mesh.cp={mesh.cp} divides padded rows, attention "{self.attention}" computes others; use "auto"'
            )
        if self.compile and self.ranks > 1:
            raise ValueError(
                f"compile=true and ranks={self.ranks} exclude each other: layers whose weights FSDP2 gathers, or that "
                "a mesh cuts, are not compiled; set compile=false"
            )
        inner = ranks // mesh.replicate
        if mesh.ep > 1 and (mesh.ep % mesh.tp or inner % mesh.ep):
            raise ValueError(
                f"mesh.ep={mesh.ep} should be a multiple of tp={mesh.tp} that divides dp * cp * tp = {inner}"
            )
        if mesh.ep > 1 and self.lora.rank and (fused := [t for t in self.lora.targets if "." in t]):
            raise ValueError(
                f"mesh.ep={mesh.ep} and lora.targets with {fused[0]!r} exclude each other: the plans that spread "
                "experts know no adapters of theirs; adapt the attention, or use mesh.dp"
            )
        if mesh.tp > 1 and self.lora.rank:
            raise ValueError(
                f"mesh.tp={mesh.tp} and lora.rank={self.lora.rank} exclude each other: the plans that cut a model into "
                "heads know no adapters; use mesh.dp"
            )
        return self

    @model_validator(mode="after")
    def _one_choice_of_parameters(self) -> PolicyConfig:
        if self.lora.rank and self.last_layers:
            raise ValueError(
                f"lora.rank={self.lora.rank} and last_layers={self.last_layers} exclude each other"
            )
        if self.lora.rank and not self.train_router:
            raise ValueError(f"train_router=false has no effect with lora.rank={self.lora.rank}")
        if self.activation_offload and self.device == "cpu":
            raise ValueError('activation_offload has no effect with device "cpu"')
        if self.attention == "flash" and self.device == "cpu":
            raise ValueError('attention "flash" needs device "cuda"')
        return self
