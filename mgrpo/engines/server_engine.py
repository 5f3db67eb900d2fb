"""Engine over servers: the interface of mgrpo/engines/base.py, through HTTP.

- Noise: a server draws from (weights, prompt, seed), whichever server it is; its logits depend on the batch in the last
  bits, so a token may differ where two are equally likely.
- Log-probs are of the sampled distribution, log_softmax(logits / temperature), of temperature 1 when greedy. A server
  that reports others is refused when it is first asked. There is no top_p or top_k: they would make a second
  distribution that the trainer does not know.
- Ids that are no token of the tokenizer (spare rows of a padded head) are biased away by each request; an answer that
  holds one fails.
- Stop texts are looked for by the server, as it samples, and once more here in what came back: a server that looks at
  the tokens of one of several requests alone, or at too few of them, ends later than it should. What it sampled beyond
  the end is thrown away.
- Versions are the server's own record of which weights sampled which token, so they are true also for a request that an
  update has interrupted, whoever made the update.
- Where routing is replayed, an answer without the experts of its tokens is a failure. They are kept for each session
  until it is released, so that a next turn asks for those of its new tokens alone.
- A cancelled call closes its own connection, which ends its own request; other clients' requests are never touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import numpy as np

from mgrpo.engines.base import PATIENCE_SECONDS, Engine, Generation, ParsedTurn, SamplingParams
from mgrpo.engines.client import Completion
from mgrpo.engines.labels import Label, parse_label
from mgrpo.engines.pool import EnginePool
from mgrpo.engines.routed import joined
from mgrpo.engines.weight_sync import C, WeightSync
from mgrpo.errors import InfrastructureError
from mgrpo.model.stop_texts import end_at
from mgrpo.model.tokens import Tokenizer
from mgrpo.model.vocabulary import Vocabulary
from mgrpo.types import Experts, Int32
from mgrpo.weights.version import Weights


@dataclass(frozen=True, slots=True)
class RoutedHistory:
    """What a session's servers have reported: experts[t], of (m, N, k), are those that tokens[t] was sent to."""

    tokens: Int32  # (n,), n > m
    experts: Experts


class ServerEngine(Engine, Generic[C]):
    """Serves one policy from one or more servers."""

    def __init__(
        self,
        pool: EnginePool[C],
        sync: WeightSync[C],
        *,
        name: str,
        vocabulary: Vocabulary,
        max_length: int,
        tokenizer: Tokenizer,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """name: how errors call the policy. vocabulary: which ids may be sampled. max_length: tokens of a history at
        most. tokenizer: the policy's, for stop texts. patience: seconds that load() waits for a first server, which may
        still be starting."""
        self._pool, self._sync = pool, sync
        self._name, self._vocab_size, self._max_length = name, vocabulary.rows, max_length
        self._unnamed = vocabulary.unnamed()
        self._tokenizer, self._patience = tokenizer, patience
        self._routed: dict[str, RoutedHistory] = {}  # of sessions, where routing is replayed
        self._version = -1
        self._closed = False

    @property
    def version(self) -> int:
        return self._version

    @property
    def takes_patches(self) -> bool:  # type: ignore[override]  # asked, never set
        return self._sync.takes_patches

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int, session: str | None = None
    ) -> Generation:
        """See Engine."""
        self._check(prompt_ids, params, seed)
        prompt = [int(token) for token in prompt_ids]
        before = self._known(session, prompt)
        known = 0 if before is None else len(before)

        async def request(server: C, model: str) -> Completion:
            answer = await server.generate(model, prompt, params, seed, self._unnamed, known)
            if server.routing is not None and answer.experts is None:
                raise InfrastructureError(server.no_routing())
            return answer

        answer, label = await self._pool.generate(request, session)
        if params.stop:
            end = end_at(self._tokenizer, params.stop, answer.token_ids)
            answer = answer if end is None else answer.cut(end)
        ids = np.asarray(answer.token_ids, np.int32)
        if strange := set(answer.token_ids).intersection(self._unnamed):
            raise InfrastructureError(
                f"{self._name}: a server sampled token id {min(strange)}, which its tokenizer does not have"
            )
        experts = answer.experts
        if experts is not None and before is not None:
            experts = joined((before, experts))
        if experts is not None and session is not None:
            self._routed[session] = RoutedHistory(np.asarray([*prompt, *answer.token_ids], np.int32), experts)
        return Generation(
            ids,
            np.minimum(np.asarray(answer.logprobs, np.float32), 0.0),  # the server's rounding may end above 0
            self._versions(answer, label, len(ids)),
            answer.finish_reason,
            experts,
        )

    def _known(self, session: str | None, prompt: Sequence[int]) -> Experts | None:
        """(m, N, k) experts of the first tokens of the prompt, as earlier calls of the session have brought them."""
        history = self._routed.get(session) if session is not None else None
        if history is None:
            return None
        n = min(len(prompt), len(history.experts))
        differs = np.flatnonzero(history.tokens[:n] != np.asarray(prompt[:n], np.int32))
        same = int(differs[0]) if len(differs) else n  # a token's experts depend on the tokens before it
        return history.experts[:same]

    @property
    def parses_turns(self) -> bool:  # type: ignore[override]  # asked, never set
        return self._pool.servers[0].client.parses_turns

    async def parse_turn(
        self, token_ids: Sequence[int], tools: Sequence[Mapping[str, object]], prompt_ids: Sequence[int] = ()
    ) -> ParsedTurn:
        """See Engine. Any ready server answers: its parsers need no weights."""
        if self._closed:
            raise InfrastructureError(f"engine of {self._name} is closed")
        ids, prompt = [int(i) for i in token_ids], [int(i) for i in prompt_ids]
        return await self._pool.ask(lambda server: server.parse_turn(ids, tools, prompt))

    def _versions(
        self, answer: Completion, asked: Label, n: int
    ) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """(n,) version of each token: from the server's spans, or of the weights that the request named."""
        if not self._sync.labels_tokens:
            return np.full(n, asked.version, np.int32)
        versions = np.full(n, -1, np.int32)
        for span in answer.spans:
            label = parse_label(span.label)
            assert label is not None  # EnginePool has checked it
            versions[span.start : span.end] = label.version
        if (versions < 0).any():
            raise InfrastructureError(
                f"{self._name}: spans {answer.spans} leave some of {n} tokens without a version"
            )
        return versions

    async def load(self, path_or_state: object, version: int) -> None:
        """Make all servers serve weights: the trainer's Weights, safetensors bytes, or a policy folder (str, Path).
        Servers that cannot be reached get them when they return. Raises InfrastructureError naming the servers when
        none took them within `patience` seconds."""
        weights = _weights_of(path_or_state, version)
        label = await self._sync.prepare(weights)
        self._version = (await self._pool.update(label, self._patience)).version

    def waiting(self) -> int:
        """Requests that wait for a ready server. What a server has queued itself counts as running: it does not
        tell."""
        return self._pool.waiting

    def release(self, session: str) -> None:
        self._routed.pop(session, None)
        self._pool.forget(session)

    async def close(self) -> None:
        self._closed = True
        await self._pool.close()

    def _check(self, prompt: Sequence[int], params: SamplingParams, seed: int) -> None:
        if self._closed:
            raise InfrastructureError(f"engine of {self._name} is closed")
        if not len(prompt):
            raise ValueError("the prompt is empty; expected at least one token id")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise ValueError(
                f"token ids {min(prompt)}..{max(prompt)} of the prompt are outside 0..{self._vocab_size - 1}"
            )
        if params.max_tokens < 1:
            raise ValueError(f"max_tokens {params.max_tokens} must be at least 1")
        coolest, hottest = self._pool.temperatures
        if params.temperature != 0 and not coolest <= params.temperature <= hottest:
            raise ValueError(f"temperature {params.temperature} must be 0 or {coolest:g}..{hottest:g}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed {seed} is outside 0..2**64 - 1")
        if len(prompt) + params.max_tokens > self._max_length:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} need "
                f"{len(prompt) + params.max_tokens} positions; {self._name} has {self._max_length}"
            )


def _weights_of(source: object, version: int) -> Weights:
    if isinstance(source, Weights):
        return source
    if isinstance(source, str | Path):
        file = Path(source) / "model.safetensors"
        if not file.is_file():
            raise ValueError(f"{source}: no weights to load, {file.name} is missing")
        return Weights.of_file(f"e0.v{version}", version, file)
    if not isinstance(source, bytes | bytearray | memoryview):
        raise TypeError(
            f"cannot load weights from {type(source).__name__}: Weights, a path or safetensors bytes"
        )
    return Weights.of_bytes(f"e0.v{version}", version, bytes(source))
