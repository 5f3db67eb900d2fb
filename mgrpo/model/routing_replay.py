"""Routing replay: the routers of a mixture of experts choose what the sampler's chose (arXiv:2510.11370, "R3").

    own     = topk(s_t, k)                                        s_t: what a router ranks the E experts of token t by
    forced  = what the engine reported, where it reported token t; else own
    output  = sum over i in forced of w_ti expert_i(x_t)          w_t: the router's own function of s_t at `forced`

Only the choice is the sampler's. The weights w are the trainer's, as differentiable as with a choice of its own, and
with the trainer's own choice every bit of the forward and backward pass is what it is without replay.

Nothing here knows the name of a model. A router is a module that calls topk(); which of its calls is the choice
(DeepSeek-V3's ranks groups first) is found when the policy is loaded, by comparing with what the router returns, and
then proved: a wrong choice must come out of the router, whose weights must not be 0 for what it would not choose: one
that ranks groups first and weights by what is left of the others (DeepSeek-V2's) is refused. The call is intercepted
while the router's forward runs, in the forward pass and in its recomputation alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mgrpo.errors import ConfigError

if TYPE_CHECKING:
    from mgrpo.model.moe import Router

UNKNOWN = -1
"""In tensors of forced choices: routed freely."""


def as_forced(experts: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> npt.NDArray[np.int16]:
    """What an engine reported (see types.Experts) as i16 of the same shape, UNKNOWN where nobody recorded it."""
    out = experts.astype(np.int16)
    out[experts == np.iinfo(experts.dtype).max] = UNKNOWN
    return out


class _Forced:
    """What the routers choose in the forward pass of one micro-batch, and again in its backward pass."""

    def __init__(self, replay: RoutingReplay, experts: Tensor) -> None:
        self._replay, self._experts = replay, experts
        self._of_router: Tensor | None = None

    def __enter__(self) -> None:
        self._replay.now = self

    def __exit__(self, *_: object) -> None:
        self._replay.now = None

    def lay_out(self, lengths: Tensor, width: int | None, device: torch.device) -> None:
        """For the tokens of a forward pass: see Routing.expect."""
        experts = self._experts
        if width is None:
            inside = torch.arange(experts.shape[1]) < lengths.cpu()[:, None]
            self._keep(experts[inside], device)
        else:
            self._keep(experts[:, :width].flatten(0, 1), device)

    def lay_out_columns(self, columns: Tensor, device: torch.device) -> None:
        """For a forward pass over these columns i64 (n,) of the rows, some of them behind the rows' end."""
        missing = max(0, int(columns.max()) + 1 - self._experts.shape[1])
        experts = F.pad(self._experts, (0, 0, 0, 0, 0, missing), value=UNKNOWN)
        self._keep(experts[:, columns].flatten(0, 1), device)

    def _keep(self, tokens: Tensor, device: torch.device) -> None:
        self._of_router = tokens.transpose(0, 1).contiguous().to(device)  # (N, T, k)

    def of(self, router: int) -> Tensor:
        """i16 (T, k)."""
        if self._of_router is None:
            raise ValueError("routers run under forced choices that no forward pass laid out")
        return self._of_router[router]


class RoutingReplay:
    """Puts given choices into the routers of a policy. Their forward is wrapped, not the module, so names stay and
    hooks see the choice that was made."""

    def __init__(self, routers: Sequence[Router], name: str) -> None:
        """name: how errors call the policy."""
        self.name = name
        self.now: _Forced | None = None
        """What is chosen at present; None: each router routes freely."""
        self.counts = False
        """Whether `seen` is filled."""
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        """Router -> bool (T,) which tokens were forced, and which of them it would have sent elsewhere itself."""
        self._routers = list(routers)
        self._experts: list[int] = []  # of each router
        self._chosen = 0  # k
        self._calls: list[int] = [0] * len(routers)  # which of a router's calls of topk is the choice
        self._watched: dict[int, list[Tensor]] | None = None  # while the calls are looked for
        self._by_values: set[int] = set()  # routers whose output depends on the values that topk() returns
        for number, router in enumerate(self._routers):
            router.module.forward = functools.partial(self._forward, number, router.module.forward)

    def forcing(self, experts: Tensor | None) -> AbstractContextManager[None]:
        """Inside the block, which may be entered again for the backward pass, the next forward pass and whatever of it
        is computed again chooses `experts` i16 (R, S, N, k). None: routed freely. Raises ValueError where they are not
        of this model's routers."""
        if experts is None:
            return nullcontext()
        found, expected = tuple(experts.shape[2:]), (len(self._routers), self._chosen)
        if found != expected:
            raise ValueError(
                f"{self.name}: the engine reports {found[1]} experts of each of {found[0]} routers, the policy has "
                f"{expected[0]} routers that choose {expected[1]}"
            )
        most = int(experts.max()) if experts.numel() else UNKNOWN
        if most >= min(self._experts):
            raise ValueError(
                f"{self.name}: the engine reports expert {most}, the policy's are 0..{min(self._experts) - 1}"
            )
        return _Forced(self, experts)

    def lay_out(self, lengths: Tensor, width: int | None, device: torch.device) -> None:
        """See Routing.expect."""
        if self.now is not None:
            self.now.lay_out(lengths, width, device)

    def lay_out_columns(self, columns: Tensor, device: torch.device) -> None:
        """See Routing.expect_columns."""
        if self.now is not None:
            self.now.lay_out_columns(columns, device)

    def _forward(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._watched is not None:
            with _Intercept(functools.partial(self._watch, number)):
                out = forward(*args, **kwargs)
            with _Intercept(_without_values):
                spoiled = forward(*args, **kwargs)
            if any(_has_nan(part) for part in (spoiled if isinstance(spoiled, tuple) else (spoiled,))):
                self._by_values.add(number)
            return out
        if self.now is None:
            return forward(*args, **kwargs)
        choose = functools.partial(self._choose, number, self.now.of(number))
        with _Intercept(choose, self._calls[number]):
            return forward(*args, **kwargs)

    def _watch(self, number: int, scores: Tensor, own: Any) -> Any:
        if self._watched is not None:
            self._watched.setdefault(number, []).append(own.indices)
        return own

    def _choose(self, number: int, wanted: Tensor, scores: Tensor, own: Any) -> Any:
        """What stands for topk(scores): own is its own answer, wanted i16 (T, k)."""
        if wanted.numel() != own.indices.numel():
            raise ValueError(
                f"{self.name}: router {number} sees {own.indices.shape[:-1].numel()} tokens, choices are given for "
                f"{len(wanted)}"
            )
        wanted = wanted.view(own.indices.shape).to(own.indices.dtype)
        known = (wanted >= 0).all(-1, keepdim=True)
        chosen = torch.where(known, wanted, own.indices)
        if self.counts:
            moved = (chosen.sort(-1).values != own.indices.sort(-1).values).any(-1)
            self.seen[number] = known.flatten(), moved.flatten()
        return torch.return_types.topk((scores.gather(-1, chosen), chosen))

    # -- when the policy is loaded -----------------------------------------------------------------------------------

    @torch.no_grad()
    def prove(self, states: Callable[..., Tensor], device: torch.device) -> None:
        """Find each router's choice and prove that it can be forced. states: backbone arguments -> hidden states.
        Raises ConfigError naming the router that does not take it."""
        ids = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1]])
        lengths = torch.tensor([ids.shape[1]])
        self._watched = {}
        try:
            with self._returned() as found:
                states(input_ids=ids.to(device))
            self._find(found, self._watched)
        finally:
            self._watched = None
        wrong = [(choice + 1) % logits.shape[-1] for _, (logits, choice) in sorted(found.items())]
        experts = torch.stack(wrong, 1).to("cpu", torch.int16)[None]  # (1, S, N, k)
        with self._returned() as forced, self.forcing(experts):
            self.lay_out(lengths, ids.shape[1], device)
            states(input_ids=ids.to(device))
        for number, (_, choice) in forced.items():
            if not torch.equal(choice, wrong[number]):
                raise self._refused(number, "it does not return the choice that is put into it")

    def _find(self, found: Mapping[int, tuple[Tensor, Tensor]], calls: Mapping[int, list[Tensor]]) -> None:
        self._experts = []
        for number in range(len(self._routers)):
            if number not in found:
                raise self._refused(number, "it does not run")
            logits, choice = found[number]
            same = [
                place
                for place, indices in enumerate(calls.get(number, ()))
                if indices.numel() == choice.numel() and torch.equal(indices.reshape(choice.shape), choice)
            ]
            if not same:
                raise self._refused(number, "none of its calls of topk() is what it returns")
            self._calls[number] = same[-1]
            if same[-1] and number in self._by_values:
                raise self._refused(
                    number,
                    "it weights experts by scores that are masked outside of the groups it has chosen itself",
                )
            self._experts.append(logits.shape[-1])
        sizes = {choice.shape[-1] for _, choice in found.values()}
        if len(sizes) > 1:
            raise ConfigError(
                f"{self.name}: policy.routing_replay: its routers choose {sorted(sizes)} experts a token, expected one "
                "number of all"
            )
        self._chosen = sizes.pop()

    def _refused(self, number: int, why: str) -> ConfigError:
        router = self._routers[number]
        return ConfigError(
            f"{self.name}: policy.routing_replay cannot force the choice of {router.name} "
            f"({type(router.module).__name__}): {why}"
        )

    @contextmanager
    def _returned(self) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        """Inside the block: router -> logits (T, E) and choice (T, k) of its last forward."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        hooks = listen(self._routers, found.__setitem__)
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


def listen(routers: Sequence[Router], note: Callable[[int, tuple[Tensor, Tensor]], None]) -> list[Any]:
    """Have `note` called with the number of a router and its logits (T, E) and choice i64 (T, k) whenever it has run;
    the hooks."""

    def hook(number: int, router: Router) -> Any:
        def of(module: nn.Module, args: Any, output: Any) -> None:
            note(number, router.logits_and_choice(output))

        return of

    # Before other hooks: those of an expert-parallel plan renumber what the router has chosen.
    return [
        router.module.register_forward_hook(hook(number, router), prepend=True)
        for number, router in enumerate(routers)
    ]


def _without_values(scores: Tensor, own: Any) -> Any:
    return torch.return_types.topk((torch.full_like(own.values, torch.nan), own.indices))


def _has_nan(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point() and bool(part.isnan().any())


class _Intercept(TorchFunctionMode):
    """Inside the block, what `answer` makes of (scores, topk's own answer) stands for topk(scores): in the call of
    number `place`, None: in every one."""

    def __init__(self, answer: Callable[[Tensor, Any], Any], place: int | None = None) -> None:
        super().__init__()
        self._answer, self._place, self._calls = answer, place, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "topk":
            return out
        self._calls += 1
        if self._place is not None and self._calls != self._place + 1:
            return out
        return self._answer(args[0] if args else (kwargs or {})["input"], out)
