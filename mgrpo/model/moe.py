"""What is special to a mixture of experts: which modules are experts and routers, how evenly the routers spread the
tokens, and the auxiliary loss that evens them out.

    f_li = 1/T sum_t [layer l sends token t to expert i]      k of E experts a token, T tokens
    P_li = 1/T sum_t p_lti                                    p: the router's probabilities of token t
    L    = 1/N sum_l E/k sum_i f_li P_li                      N layers with experts; 1 where all experts are alike

This is the loss of Switch Transformers (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6), with these deviations:

1. k experts a token, where Switch has one: divided by k, so that 1 is even for every k. Mean over layers, each with its
   own f and P.
2. f is that of the whole minibatch on all ranks (Qiu et al. 2025, arXiv:2501.11873), counted in a forward pass without
   gradient before the first backward pass. f has no gradient, so what is left is a sum over tokens: the gradient does
   not depend on how the minibatch is cut into micro-batches or divided among ranks.
3. p is the softmax of the router's logits over all experts, whatever the router does with them. Only where a router is
   balanced by a bias on its scores, p is its sigmoid scores divided by their sum (DeepSeek-V3, arXiv:2412.19437,
   section 2.1.2).
4. The tokens are those that enter the model: no padding, no last token of a trajectory, no trajectory that needs no
   forward pass.

Nothing here knows the name of a model: experts hold parameters of three dimensions, one matrix an expert, and routers
are the modules whose logits transformers itself records.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.routing_replay import RoutingReplay


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold the fused experts of a layer, by their names in `model`: those with a parameter (E, ., .)
    and a count of experts."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "num_experts") and any(p.ndim == 3 for p in module.parameters(recurse=False))
    }


@dataclass(frozen=True, slots=True)
class Router:
    """A module that chooses experts, by its name in the model."""

    name: str
    module: nn.Module
    index: int
    """Which of its outputs are the logits (T, E)."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """f32 (T, E), each row with sum 1; see deviation 3."""
        if hasattr(self.module, "e_score_correction_bias"):
            scores = logits.float().sigmoid()
            return scores / scores.sum(-1, keepdim=True)
        return logits.float().softmax(-1)

    def logits_and_choice(self, output: Any) -> tuple[Tensor, Tensor]:
        """From what the module returned: logits (T, E), and i64 (T, k), the experts of each token."""
        outputs = output if isinstance(output, tuple) else (output,)
        logits: Tensor = outputs[self.index].flatten(0, -2)
        for found in outputs:
            if isinstance(found, Tensor) and found.dtype == torch.int64 and found.ndim >= 2:
                choice = found.flatten(0, -2)
                if len(choice) == len(logits):
                    return logits, choice
        return logits, logits.topk(int(getattr(self.module, "top_k", 1)), -1).indices


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of a transformers model, first layer to last; none for a dense one."""
    found: dict[str, Router] = {}
    for prefix, part in model.named_modules():
        specs = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits", ())
        for spec in specs if isinstance(specs, list | tuple) else (specs,):
            kind, index = getattr(spec, "target_class", spec), int(getattr(spec, "index", 1))
            for name, module in part.named_modules(prefix=prefix):
                if isinstance(kind, type) and issubclass(type(module), kind):
                    found[name] = Router(name, module, index)
    return [found[name] for name, _ in model.named_modules() if name in found]


class RouterLoad:
    """How the routers of a policy spread the tokens of a minibatch: sums, which stay on the device until they are
    read."""

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens that entered the model."""
        # Router -> f64 (2 E + 3,): see Packed.
        self._sums: dict[int, Tensor] = {}
        self._chosen: dict[int, int] = {}  # router -> k

    @torch.no_grad()
    def add(
        self,
        router: int,
        logits: Tensor,
        choice: Tensor,
        probabilities: Tensor,
        real: Tensor | None,
        forced: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Tokens of one forward pass through one router. real: bool (T,), False at padding; None: all are real. forced:
        see RoutingReplay.seen; None: no choice was."""
        ones = torch.ones_like(choice) if real is None else real[:, None].expand_as(choice).to(choice.dtype)
        counts = choice.new_zeros(logits.shape[-1]).scatter_add_(0, choice.flatten(), ones.flatten())
        entropy = -torch.special.xlogy(probabilities, probabilities).sum(-1, keepdim=True)
        values = torch.cat((probabilities, entropy), -1)
        totals = (values if real is None else values * real[:, None]).sum(0)
        if forced is None:
            replayed = counts.new_zeros(2)
        else:
            replayed = torch.stack([(part if real is None else part & real).sum() for part in forced])
        sums = torch.cat((counts.double(), totals.double(), replayed.double()))
        self._sums[router] = self._sums[router] + sums if router in self._sums else sums
        self._chosen[router] = choice.shape[-1]

    def packed(self) -> Packed:
        """All of it in main memory; picklable."""
        order = sorted(self._sums)
        if not order:
            return self.tokens, []
        sizes = [len(self._sums[router]) for router in order]
        parts = torch.cat([self._sums[router] for router in order]).cpu().split_with_sizes(sizes)
        return self.tokens, [(self._chosen[router], part) for router, part in zip(order, parts, strict=True)]


Packed = tuple[int, list[tuple[int, Tensor]]]
"""Tokens; of each router k, and f64 (2 E + 3,): how many tokens each expert got, the sums of its probabilities, the sum
of the tokens' entropies, the tokens whose choice was forced, and those of them that it would have sent elsewhere."""


class Balance:
    """What a minibatch's RouterLoads say, of all ranks together."""

    def __init__(self, parts: Sequence[Packed], replays: bool = False) -> None:
        """parts: of each rank, in the order of ranks; one without tokens has no routers. replays: the metrics say how
        much was forced."""
        self.tokens = sum(tokens for tokens, _ in parts)
        self._replays = replays
        self._routers: list[tuple[int, Tensor]] = []
        self._factors: list[Tensor] | None = None
        for same in zip(*(routers for _, routers in parts if routers), strict=True):
            self._routers.append((same[0][0], torch.stack([sums for _, sums in same]).sum(0)))

    def metrics(self) -> dict[str, float]:
        """Means over the routers; {} where no token went through one."""
        if not self.tokens:
            return {}
        total = dict.fromkeys(("load_imbalance", "dead_experts", "router_entropy", "aux_loss"), 0.0)
        for chosen, sums in self._routers:
            experts = _experts_in(sums)
            counts, probabilities = sums[:experts], sums[experts : 2 * experts]
            total["load_imbalance"] += float(counts.max() / counts.mean())
            total["dead_experts"] += float((counts == 0).double().mean())
            total["router_entropy"] += float(sums[-3]) / self.tokens
            total["aux_loss"] += float(counts @ probabilities) * experts / (chosen * self.tokens**2)
        out = {f"moe/{name}": value / len(self._routers) for name, value in total.items() if self._routers}
        if self._replays and self._routers:
            forced, moved = (sum(float(sums[at]) for _, sums in self._routers) for at in (-2, -1))
            out["moe/replayed"] = forced / (self.tokens * len(self._routers))
            out["moe/rerouted"] = moved / forced if forced else 0.0
        return out

    def factors(self, device: torch.device) -> list[Tensor]:
        """Of each router f32 (E,): what a token's probabilities are multiplied with in L. They are brought to the
        device once."""
        if self._factors is None:
            self._factors = []
            for chosen, sums in self._routers:
                experts = _experts_in(sums)
                scale = experts / (chosen * self.tokens**2 * len(self._routers))
                self._factors.append((sums[:experts] * scale).float().to(device))
        return self._factors


def _experts_in(sums: Tensor) -> int:
    return (len(sums) - 3) // 2


class Routing:
    """The routers of a policy, and what they decide while somebody records it. A dense policy has none."""

    def __init__(self, model: nn.Module, replays: bool = False, name: str = "policy") -> None:
        """replays: choices can be forced (policy.routing_replay), once the replay is proved. name: for errors."""
        self.routers = routers_of(model)
        self.replay = RoutingReplay(self.routers, name) if replays else None
        self._load: RouterLoad | None = None
        self._kept: list[tuple[int, Tensor, Tensor | None]] | None = None
        self._recording = False
        self._real: Tensor | None = None

    @contextlib.contextmanager
    def record(self, load: RouterLoad | None = None, keep: bool = False) -> Iterator[None]:
        """Inside the block forward passes are added to `load`; with keep their logits wait, with their graph, for
        balance_loss(). Without routers nothing happens. Not to be nested."""
        if not self.routers or (load is None and not keep):
            yield
            return
        self._load, self._kept, self._recording = load, [] if keep else None, True
        # Before other hooks: those of an expert-parallel plan renumber what the router has chosen.
        hooks = [
            router.module.register_forward_hook(self._hook(number, router), prepend=True)
            for number, router in enumerate(self.routers)
        ]
        if self.replay is not None:
            self.replay.counts = load is not None
        try:
            yield
        finally:  # a recomputation in the backward pass is no second forward
            if self.replay is not None:
                self.replay.counts = False
                self.replay.seen.clear()
            for hook in hooks:
                hook.remove()
            self._load = self._real = None
            self._recording = False

    def forcing(self, experts: Tensor | None) -> AbstractContextManager[None]:
        """Around a forward pass, and again around its backward pass: see RoutingReplay.forcing. Routed freely where the
        policy does not replay."""
        return contextlib.nullcontext() if self.replay is None else self.replay.forcing(experts)

    def expect(self, lengths: Tensor, width: int | None, device: torch.device) -> None:
        """The next forward has rows with `lengths` tokens (R,), padded to `width`; None: packed without padding."""
        if self.replay is not None:
            self.replay.lay_out(lengths, width, device)
        if not self._recording:
            return
        lengths = lengths.cpu()
        if width is None:
            self._expect(torch.ones(int(lengths.sum()), dtype=torch.bool), device)
        else:
            self._expect(torch.arange(width) < lengths[:, None], device)

    def expect_columns(self, lengths: Tensor, columns: Tensor, device: torch.device) -> None:
        """The next forward has these columns i64 (n,) of rows with `lengths` tokens (R,)."""
        if self.replay is not None:
            self.replay.lay_out_columns(columns, device)
        if self._recording:
            self._expect(columns < lengths.cpu()[:, None], device)

    def _expect(self, inside: Tensor, device: torch.device) -> None:
        """inside: bool, in main memory: where the tokens of the next forward are none of padding."""
        count = int(inside.sum())
        self._real = None if count == inside.numel() else inside.flatten().to(device)
        if self._load is not None:
            self._load.tokens += count

    def balance_loss(self, balance: Balance) -> Tensor | None:
        """This process' part of L over what was recorded with keep, and forgets it: the parts of all micro-batches and
        ranks sum up to L of the minibatch. None where nothing was recorded."""
        total: Tensor | None = None
        for number, logits, real in self._kept or ():
            p = self.routers[number].probabilities(logits)
            each = p @ balance.factors(p.device)[number]
            part = each.sum() if real is None else (each * real).sum()
            total = part if total is None else total + part
        self._kept = None
        return total

    def _hook(self, number: int, router: Router) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            logits, choice = router.logits_and_choice(output)
            if self._load is not None:
                with torch.no_grad():
                    probabilities = router.probabilities(logits)
                forced = None if self.replay is None else self.replay.seen.pop(number, None)
                self._load.add(number, logits, choice, probabilities, self._real, forced)
            if self._kept is not None:
                self._kept.append((number, logits, self._real))

        return note


def check(model: nn.Module, config: PolicyConfig, routing: Routing, name: str) -> None:
    """Raises ConfigError where a setting is about experts that the model does not have. name: how errors call it."""
    kind = type(model).__name__
    if config.aux_loss_coef and not routing.routers:
        raise ConfigError(
            f"{name}: policy.aux_loss_coef={config.aux_loss_coef:g} needs a mixture of experts whose routers "
            f"transformers records; {kind} has none"
        )
    if config.routing_replay and not routing.routers:
        raise ConfigError(
            f"{name}: policy.routing_replay=true needs a mixture of experts whose routers transformers records; {kind} "
            "has none"
        )
    if not config.train_router and not routing.routers:
        raise ConfigError(
            f"{name}: policy.train_router=false has no effect: {kind} has no routers that transformers records"
        )
    if config.experts != "auto" and not experts_of(model):
        raise ConfigError(
            f'{name}: policy.experts="{config.experts}" has no effect: {kind} has no fused experts'
        )


def choose(model: Any, config: PolicyConfig, name: str) -> str | None:
    """Set how the products of the experts are computed, and return it; None for a dense model. Raises ConfigError where
    the model cannot compute them so."""
    if not experts_of(model):
        return None
    wanted = config.experts
    if not getattr(model, "_can_set_experts_implementation", lambda: False)():
        if wanted not in ("auto", "eager"):
            raise ConfigError(
                f'{name}: policy.experts="{wanted}": {type(model).__name__} computes its experts in its own way alone; '
                'take "auto"'
            )
        return "eager"
    try:
        model.set_experts_implementation("grouped_mm" if wanted == "auto" else wanted)
    except (ValueError, ImportError) as error:
        if wanted != "auto":
            raise ConfigError(f'{name}: policy.experts="{wanted}": {error}') from None
        model.set_experts_implementation("eager")
    return str(model.config.get_text_config()._experts_implementation)


def means(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of experts among those of several minibatches: their means."""
    names = [name for name in results[0] if name.startswith("moe/")] if results else []
    return {name: sum(result[name] for result in results) / len(results) for name in names}
