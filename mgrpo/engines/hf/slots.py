"""Running requests as arrays over slots, and the draw of one token for each of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mgrpo.engines.base import SamplingParams


class SlotArrays:
    """The running requests as arrays over slots, so that a decode step touches no Python object per row."""

    def __init__(self, slots: int) -> None:
        self.running = np.zeros(slots, bool)
        self.watched = np.zeros(slots, bool)  # the request has stop texts
        self.length = np.zeros(slots, np.int64)  # tokens in the cache
        self.feeding = np.zeros(slots, np.int64)  # tokens to feed before the next sample
        self.count = np.zeros(slots, np.int64)  # tokens sampled
        self.limit = np.zeros(slots, np.int64)
        self.last = np.zeros(slots, np.int64)  # newest sampled token
        self.temperature = np.zeros(slots, np.float32)
        self.stop = np.full((slots, 1), -1, np.int64)
        self.uniforms = np.zeros((slots, 0), np.float32)
        self.tokens = np.zeros((slots, 0), np.int32)
        self.logprobs = np.zeros((slots, 0), np.float32)
        self.versions = np.zeros((slots, 0), np.int32)

    def start(self, index: int, params: SamplingParams, seed: int, prompt: int, cached: int) -> None:
        """RoleStream `index` runs a request whose prompt has `prompt` tokens, `cached` of them in the cache."""
        if self.uniforms.shape[1] < params.max_tokens:
            for name in ("uniforms", "tokens", "logprobs", "versions"):
                self._widen(name, params.max_tokens)
        if self.stop.shape[1] < len(params.stop_token_ids):
            self._widen("stop", len(params.stop_token_ids))
        self.running[index], self.watched[index] = True, bool(params.stop)
        self.length[index], self.feeding[index] = cached, prompt - cached
        self.count[index], self.limit[index] = 0, params.max_tokens
        self.temperature[index] = params.temperature
        self.stop[index] = -1
        self.stop[index, : len(params.stop_token_ids)] = params.stop_token_ids
        if params.temperature > 0:
            noise = np.random.Generator(np.random.Philox(key=seed))
            self.uniforms[index, : params.max_tokens] = noise.random(params.max_tokens, np.float32)

    def _widen(self, name: str, columns: int) -> None:
        array = getattr(self, name)
        wider = np.full((len(array), max(columns, 2 * array.shape[1])), -1, array.dtype)
        wider[:, : array.shape[1]] = array
        setattr(self, name, wider)


def sample(
    logits: Tensor, temperature: Tensor, uniforms: Tensor
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """One token a row by inverse CDF: the first whose cumulated probability exceeds the row's uniform.

    logits (R, V) fp32, temperature (R,) with 0 for greedy, uniforms (R,) in [0, 1), both in main memory, where a
    look at them waits for nothing. Returns tokens i32 (R,) and their log-probs f32 (R,), at temperature 1 for greedy
    rows. A token of probability 0 is never drawn.
    """
    device, greedy = logits.device, temperature == 0
    if not bool(((temperature == 1) | greedy).all()):
        logits = logits / torch.where(greedy, 1.0, temperature).to(device)[:, None]
    probs = logits.softmax(-1)
    cumulated = probs.cumsum(-1)
    total = cumulated[:, -1]
    # Strictly below the total, so that rounding cannot select past the last token of positive probability.
    target = torch.minimum(uniforms.to(device) * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulated, target[:, None], right=True).squeeze(1)
    if bool(greedy.any()):
        tokens = torch.where(greedy.to(device), logits.argmax(-1), tokens)
    tokens.clamp_(max=logits.shape[1] - 1)  # only reached where the logits are not finite
    logprobs = probs.gather(1, tokens[:, None]).squeeze(1).log()
    return tokens.to(torch.int32).cpu().numpy(), logprobs.cpu().numpy()
