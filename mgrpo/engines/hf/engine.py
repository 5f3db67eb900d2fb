"""In-process engine over a Hugging Face model: continuous batching on a slot cache.

Each step feeds every running request at once: its whole prompt (in chunks), what its session's history gained since the
last turn, or the one token it sampled before. Requests of similar width share a forward. Those fed to their end sample.

- Noise: request tokens use u_0, u_1, ... = numpy's Philox(seed), one uniform a token, by inverse CDF;
  neighbours and arrival order do not matter. Logits depend on the batch in the last bits only (matrix kernels
  differ by shape).
- Log-probs are of the sampled distribution, log_softmax(logits / temperature) in fp32; of temperature 1 when
  greedy. Logits are those of the tokenizer's tokens: spare rows of the head are never sampled.
- A session keeps its slot between turns; only new tokens are fed. The least recently used idle session makes
  room when slots run out, and is fed afresh when it comes back.
- Stop texts are looked for in what the policy's own tokenizer makes of the tokens (model/stop_texts.py): two decodings
  of a few tokens a step and request, of requests that have stop texts alone.
- admit_every: requests start at every n-th step only, unless nothing else runs. Rollouts that are spread over all
  stages of their turns bring a new prompt at nearly every step, and each costs a forward beside that of the running
  ones; held for a few steps, their prompts share one.
- `load` swaps weights between steps, in place (load.py). Each token keeps the version that sampled it, and its
  log-prob. A request in flight goes on in one of two ways. on_update "keep": on the keys and values of the old weights,
  which costs nothing; what it samples from then on comes from a mixture, and its log-probs are those of no version.
  "recompute": its prompt and what it sampled are fed again first, so every token has exactly the log-prob that its
  version gives. The noise is the same in both. Every idle session is fed afresh on its next turn, so that a turn which
  no update interrupted has exact log-probs either way.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mgrpo.config.engine import OnUpdate
from mgrpo.engines.base import Engine, Generation, SamplingParams
from mgrpo.engines.hf.experts import SlotExperts
from mgrpo.engines.hf.forward import check_served, feed
from mgrpo.engines.hf.kv_cache import SlotCache
from mgrpo.engines.hf.load import WeightLoader
from mgrpo.engines.hf.scheduler import Stepper
from mgrpo.engines.hf.slots import SlotArrays, sample
from mgrpo.errors import InfrastructureError
from mgrpo.model.groups import Int64, width_groups
from mgrpo.model.loading import load_policy
from mgrpo.model.places import Shapes, places_of
from mgrpo.model.policy import Policy, state_from_bytes, state_of
from mgrpo.model.stop_texts import StopTexts
from mgrpo.profiling.stages import mark
from mgrpo.weights.version import Weights

FORWARD_COST = 64
"""What starting one more forward costs, in token positions: decides which widths share a forward."""


@dataclass(slots=True, eq=False)
class _Request:
    prompt: Int64
    params: SamplingParams
    seed: int
    session: str | None
    future: asyncio.Future[Generation]


@dataclass(slots=True)
class _Slot:
    """One row of the cache. `tokens` are the ids whose keys and values it holds when idle."""

    session: str | None = None
    request: _Request | None = None
    tokens: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    feed: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))  # known tokens, not yet in the cache
    stops: StopTexts | None = None  # of the request
    epoch: int = -1  # count of loads when these keys and values were computed
    used: int = 0


class HfEngine(Engine):
    """Serves one policy in this process. Steps run on the event loop's own thread."""

    takes_patches = True

    def __init__(
        self,
        policy: Policy,
        *,
        version: int = 0,
        slots: int = 128,
        max_length: int | None = None,
        prefill_chunk: int = 256,
        on_update: OnUpdate = "recompute",
        places: Callable[[Shapes], Mapping[str, Tensor]] | None = None,
        admit_every: int = 1,
        wait_for_calls: bool = False,
        report_experts: bool = False,
    ) -> None:
        """version: of the weights `policy` holds now. slots: histories cached at once, and largest batch. max_length:
        tokens of a history, at most (default) the model's context. prefill_chunk: prompt tokens a row and forward.
        on_update: what load() does with requests in flight. places: what of the model load() replaces (see
        WeightLoader); None: all of it. admit_every: steps from one admission to the next (see the module's docstring
        for both). wait_for_calls: no step while a tool or judge is asked (scheduler.py). report_experts: see
        Generation.experts. Raises ConfigError for a model that this engine cannot serve (forward.py)."""
        context = policy.context_length
        max_length = context if max_length is None else max_length
        if max_length is None:
            raise ValueError(f"{policy.name} names no context length; give max_length")
        if min(slots, prefill_chunk, admit_every) < 1:
            raise ValueError(
                f"slots {slots}, prefill_chunk {prefill_chunk} and admit_every {admit_every} must be at least 1"
            )
        if not 1 < max_length <= (context or max_length):
            raise ValueError(
                f"max_length {max_length} of {policy.name} is outside 2..{context}, its context length"
            )
        layers = len(policy.layers)
        check_served(policy, layers, max_length)
        self.policy, self.max_length, self.prefill_chunk = policy, max_length, prefill_chunk
        self._on_update, self._admit_every, self._held = on_update, admit_every, 0
        self._wait_for_calls = wait_for_calls
        self._loader = WeightLoader(places or functools.partial(places_of, policy.model))
        self._version = version
        self._slots = [_Slot() for _ in range(slots)]
        self._by_session: dict[str, int] = {}
        self._waiting: list[_Request] = []
        self._busy_sessions: set[str] = set()  # with a request in hand
        self._arrays = SlotArrays(slots)
        self._cache = SlotCache(layers, slots, min(64, max_length))
        self._experts = SlotExperts(policy, slots) if report_experts else None
        self._clock = self._epoch = 0
        self._closed = False

    @property
    def version(self) -> int:
        return self._version

    @property
    def label(self) -> str:
        """Of the weights that it holds, which a patch must lead on from; "" where they came without one."""
        return self._loader.label

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int, session: str | None = None
    ) -> Generation:
        """See Engine. ValueError also when a session is running or its prompt does not extend its history."""
        prompt = self._checked(prompt_ids, params, seed, session)
        request = _Request(prompt, params, seed, session, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        stepper = Stepper.running()
        stepper.submit(self, self._wait_for_calls)
        if session is not None:
            self._busy_sessions.add(session)
        try:
            with stepper.waiting() if self._wait_for_calls else contextlib.nullcontext():
                return await request.future
        except asyncio.CancelledError:
            self._drop(request)
            raise
        finally:
            if session is not None:
                self._busy_sessions.discard(session)

    async def load(self, path_or_state: object, version: int) -> None:
        """Swap the weights: a policy folder (str, Path), Weights, safetensors bytes or a state dict. See the module's
        docstring for what becomes of cached keys and values, and load.py for how they are replaced. Raises ValueError,
        ConfigError or CorruptionError and keeps the old weights where the new do not fit."""
        source = path_or_state
        if isinstance(source, bytes | bytearray | memoryview):
            source = state_from_bytes(bytes(source))
        elif isinstance(source, str | Path):
            source = state_of(load_policy(source).model)
        if isinstance(source, Weights):
            self._loader.load(source)
            self._loader.confirm(self.policy, source)
        elif isinstance(source, Mapping):
            self._loader.copy(source)
        else:
            raise TypeError(f"cannot load weights from {type(source).__name__}: a path, bytes or state dict")
        self._version = version
        self._epoch += 1
        if self._on_update == "recompute":
            for index in np.flatnonzero(self._arrays.running).tolist():
                self._feed_again(index)

    def release(self, session: str) -> None:
        """Forget the session's history. Unknown sessions are ignored; a running one goes when it is done."""
        index = self._by_session.pop(session, None)
        if index is not None:
            self._slots[index].session = None

    async def close(self) -> None:
        self._closed = True
        self._fail_all(f"engine of {self.policy.name} was closed")
        for layer in self._cache.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False

    # -- stepping --

    def requests(self) -> int:
        """Requests that are running or waiting."""
        return len(self._waiting) + int(self._arrays.running.sum())

    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    def step(self) -> bool:
        """Feed and sample once; True when a request was answered."""
        try:
            with torch.inference_mode():
                self._admit()
                return self._advance()
        except Exception as error:  # every caller gets it, whatever it is
            self._fail_all(
                f"engine of {self.policy.name} failed at version {self._version}: {error!r}", error
            )
            return True

    def _admit(self) -> None:
        """Give waiting requests slots, returning sessions first: theirs must not be taken from them."""
        self._held += 1
        if not self._waiting or (self._held < self._admit_every and self._arrays.running.any()):
            return
        self._held = 0
        waiting = self._waiting
        if self._wait_for_calls:  # they came in the order of the answers that their rollouts got
            waiting = sorted(waiting, key=lambda r: r.session or "")
        own = [r for r in waiting if r.session is not None and r.session in self._by_session]
        for request in own:
            self._start(self._by_session[request.session], request)  # type: ignore[index]
        others = [r for r in waiting if r.session is None or r.session not in self._by_session]
        free = [i for i, s in enumerate(self._slots) if s.request is None and s.session is None]
        if len(free) < len(others):
            idle = [i for i, s in enumerate(self._slots) if s.request is None and s.session is not None]
            free += sorted(idle, key=lambda i: self._slots[i].used)
        for index, request in zip(free, others, strict=False):
            self._evict(index)
            self._start(index, request)
        self._waiting = others[len(free) :]

    def _evict(self, index: int) -> None:
        slot = self._slots[index]
        if slot.session is not None:
            del self._by_session[slot.session]
        slot.session, slot.tokens = None, slot.tokens[:0]

    def _start(self, index: int, request: _Request) -> None:
        slot = self._slots[index]
        # Always fewer than the prompt's, or there would be nothing to feed: _check_session.
        cached = len(slot.tokens) if slot.epoch == self._epoch else 0
        slot.request, slot.session, slot.epoch = request, request.session, self._epoch
        slot.feed = request.prompt[cached:]
        slot.stops = StopTexts(self.policy.tokenizer, request.params.stop) if request.params.stop else None
        if request.session is not None:
            self._by_session[request.session] = index
        self._arrays.start(index, request.params, request.seed, len(request.prompt), cached)

    def _feed_again(self, index: int) -> None:
        """Drop a running request's keys and values; the weights of now compute them before its next token."""
        slot, arrays = self._slots[index], self._arrays
        assert slot.request is not None
        slot.feed = np.concatenate([slot.request.prompt, arrays.tokens[index, : arrays.count[index]]])
        slot.epoch = self._epoch
        arrays.length[index], arrays.feeding[index] = 0, len(slot.feed)

    def _advance(self) -> bool:
        if self._loader.torn:
            raise InfrastructureError("its weights are torn, a load of a whole version has failed")
        arrays = self._arrays
        active = np.flatnonzero(arrays.running)
        if not len(active):
            return False
        width = np.minimum(arrays.feeding[active], self.prefill_chunk)
        ready, logits = [], []
        for group in width_groups(width, FORWARD_COST):
            rows = active[group]
            with mark("decode" if width[group].max() == 1 else "prefill"):
                hidden = self._forward(rows, width[group])
            done = arrays.feeding[rows] == 0
            if done.any():
                ready.append(rows[done])
                hidden = hidden if done.all() else hidden[torch.from_numpy(done)]
                logits.append(self.policy.vocabulary.logits(hidden, self.policy.head_weight))
        if not ready:
            return False
        with mark("sample"):
            return self._sample(np.concatenate(ready), torch.cat(logits).float())

    def _forward(self, rows: Int64, counts: Int64) -> Tensor:
        """Feed counts[i] tokens of slot rows[i]; hidden states (R, H) of each row's last."""
        arrays = self._arrays
        new = int(counts.max())
        ids = arrays.last[rows][:, None] if new == 1 else np.zeros((len(rows), new), np.int64)
        for i, row in enumerate(rows):
            slot = self._slots[row]
            if len(slot.feed):
                ids[i, : counts[i]] = slot.feed[: counts[i]]
                slot.feed = slot.feed[counts[i] :]
            elif new > 1:
                ids[i, 0] = arrays.last[row]
        states = feed(self.policy, self._cache, rows, arrays.length[rows], ids, counts)
        if self._experts is not None:
            self._experts.keep(rows, arrays.length[rows], counts)
        arrays.length[rows] += counts
        arrays.feeding[rows] -= counts
        return states[torch.arange(len(rows)), torch.from_numpy(counts - 1)] if new > 1 else states[:, 0]

    def _sample(self, rows: Int64, logits: Tensor) -> bool:
        """Draw one token for each of rows from logits (R, N) of the tokens; finish those that are done."""
        arrays = self._arrays
        count = arrays.count[rows]
        classes, logprobs = sample(
            logits, torch.from_numpy(arrays.temperature[rows]), torch.from_numpy(arrays.uniforms[rows, count])
        )
        tokens = self.policy.vocabulary.tokens(torch.from_numpy(classes)).numpy()
        if not np.isfinite(logprobs).all():
            bad = self._slots[int(rows[np.flatnonzero(~np.isfinite(logprobs))[0]])].request
            raise InfrastructureError(f"log-probs are not finite, first for session {bad and bad.session}")
        arrays.tokens[rows, count] = tokens
        arrays.logprobs[rows, count] = logprobs
        arrays.versions[rows, count] = self._version
        arrays.last[rows] = tokens
        arrays.count[rows] += 1
        arrays.feeding[rows] = 1
        stopped = (arrays.stop[rows] == tokens[:, None]).any(axis=1)
        for i in np.flatnonzero(arrays.watched[rows]).tolist():
            stops = self._slots[rows[i]].stops
            assert stops is not None
            stopped[i] |= stops.completed_by(int(tokens[i]))
        over = stopped | (arrays.count[rows] == arrays.limit[rows])
        for row, stop in zip(rows[over].tolist(), stopped[over].tolist(), strict=True):
            self._finish(row, "stop" if stop else "length")
        return bool(over.any())

    def _finish(self, index: int, reason: Literal["stop", "length"] | None) -> None:
        """Answer the slot's request (drop it if reason is None); the slot stays with its session, if any."""
        slot, arrays = self._slots[index], self._arrays
        request = slot.request
        assert request is not None
        n = int(arrays.count[index])
        answered = reason is not None and not request.future.done()
        history = np.concatenate([request.prompt, arrays.tokens[index, :n]])
        # Forgotten after a cancellation, so that the caller may ask the same again.
        slot.tokens = history[: arrays.length[index] if answered else 0]
        slot.request, slot.stops, slot.feed = None, None, slot.feed[:0]
        self._clock += 1
        slot.used = self._clock
        arrays.running[index] = False
        if reason is not None and answered:
            request.future.set_result(
                Generation(
                    arrays.tokens[index, :n].copy(),
                    arrays.logprobs[index, :n].copy(),
                    arrays.versions[index, :n].copy(),
                    reason,
                    None if self._experts is None else self._experts.of(index, int(arrays.length[index])),
                )
            )

    def _drop(self, request: _Request) -> None:
        """The caller of `request` has gone."""
        self._waiting = [r for r in self._waiting if r is not request]
        for index, slot in enumerate(self._slots):
            if slot.request is request:
                self._finish(index, None)

    def _fail_all(self, message: str, cause: Exception | None = None) -> None:
        """Answer every request with an InfrastructureError and forget every history."""
        requests = self._waiting + [s.request for s in self._slots if s.request is not None]
        self._waiting, self._by_session = [], {}
        self._slots = [_Slot() for _ in self._slots]
        self._arrays.running[:] = False
        for request in requests:
            if not request.future.done():
                failure = InfrastructureError(message)
                failure.__cause__ = cause
                request.future.set_exception(failure)

    def _checked(
        self, prompt_ids: Sequence[int], params: SamplingParams, seed: int, session: str | None
    ) -> Int64:
        prompt = np.asarray(prompt_ids, np.int64)
        if self._closed:
            raise InfrastructureError(f"engine of {self.policy.name} is closed")
        if prompt.ndim != 1 or not len(prompt):
            raise ValueError(f"the prompt has shape {prompt.shape}; expected at least one token id")
        if prompt.view(np.uint64).max() >= self.policy.vocab_size:  # negative ids are the largest of all
            raise ValueError(
                f"token ids {prompt.min()}..{prompt.max()} of the prompt are outside "
                f"0..{self.policy.vocab_size - 1}"
            )
        if params.max_tokens < 1 or not 0 <= params.temperature < math.inf:
            raise ValueError(
                f"max_tokens {params.max_tokens} must be >= 1, temperature {params.temperature} finite, >= 0"
            )
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed {seed} is outside 0..2**64 - 1")
        if len(prompt) + params.max_tokens > self.max_length:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} need "
                f"{len(prompt) + params.max_tokens} positions; {self.policy.name} has {self.max_length}"
            )
        if session is not None:
            self._check_session(prompt, session)
        return prompt

    def _check_session(self, prompt: Int64, session: str) -> None:
        if session in self._busy_sessions:
            raise ValueError(f"session {session!r} already has a request running")
        if session in self._by_session:
            slot = self._slots[self._by_session[session]]
            n = len(slot.tokens)
            if len(prompt) <= n or not np.array_equal(prompt[:n], slot.tokens):
                raise ValueError(
                    f"the prompt of session {session!r} ({len(prompt)} tokens) does not extend "
                    f"its history of {n}"
                )
