"""An engine without weights for the tests of a task: what the policy would sample is written by a function.

agent = Agent("main", ScriptedEngine(lambda text: "7 .", tokenizer), tokenizer, temperature=1.0, max_length=64)
rollout = asyncio.run(task.play(question, Episode("q", 0, {"main": agent}, seed=1)))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mgrpo.engines.base import Engine, Generation, SamplingParams
from mgrpo.model.stop_texts import end_at
from mgrpo.model.tokens import Tokenizer


class ScriptedEngine(Engine):
    """Samples what `script` returns for the text of the trajectory so far, cut at max_tokens and after a stop token or
    the token that completes a stop text, as a real engine would; every log-prob is 0."""

    def __init__(self, script: Callable[[str], str], tokenizer: Tokenizer) -> None:
        self.script, self.tokenizer = script, tokenizer
        self.released: list[str] = []

    @property
    def version(self) -> int:
        return 0

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int, session: str | None = None
    ) -> Generation:
        text = self.script(self.tokenizer.decode(list(prompt_ids)))
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))[: params.max_tokens]
        stops = [i for i, token in enumerate(ids, 1) if token in params.stop_token_ids]
        if params.stop and (end := end_at(self.tokenizer, params.stop, ids)) is not None:
            stops.append(end)
        ids = ids[: min(stops)] if stops else ids
        n = len(ids)
        return Generation(
            np.asarray(ids, np.int32),
            np.zeros(n, np.float32),
            np.zeros(n, np.int32),
            "stop" if stops else "length",
        )

    async def load(self, path_or_state: object, version: int) -> None:
        raise NotImplementedError("a script has no weights")

    def release(self, session: str) -> None:
        self.released.append(session)
