"""The draw of one token a row, and the arrays it reads from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mgrpo.engines.base import SamplingParams
from mgrpo.engines.hf.slots import SlotArrays, sample


def test_inverse_cdf_draws_the_distribution_and_never_the_impossible():
    """Uniforms on a fine grid give token frequencies equal to softmax; the edges stay inside the support."""
    logits = torch.tensor([[0.5, -1.0, 2.0, float("-inf"), 0.0, float("-inf")]])
    n = 20_000
    u = (torch.arange(n) + 0.5) / n
    tokens, logprobs = sample(logits.expand(n, -1), torch.full((n,), 0.5), u)
    expected = (logits[0] / 0.5).softmax(-1).numpy()
    np.testing.assert_allclose(np.bincount(tokens, minlength=6) / n, expected, atol=2 / n)
    np.testing.assert_allclose(np.exp(logprobs), expected[tokens], rtol=1e-5)
    edges = torch.tensor([0.0, 1.0 - 2.0**-24, 1.0])
    assert set(sample(logits.expand(3, -1), torch.ones(3), edges)[0].tolist()) <= {0, 4}
    greedy, logprobs = sample(logits, torch.zeros(1), torch.zeros(1))
    assert greedy.tolist() == [2]
    assert logprobs[0] == pytest.approx(logits.log_softmax(-1)[0, 2].item(), abs=1e-6)


def test_a_broken_row_is_seen_in_its_logprob():
    """Logits that are not finite give a log-prob that is not, and leave the other rows as they are."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, float("nan"), 2.0]])
    tokens, logprobs = sample(logits, torch.ones(2), torch.tensor([0.99, 0.99]))
    assert tokens[0] == 2
    assert np.isfinite(logprobs).tolist() == [True, False]


def test_slots_widen_without_losing_what_runs():
    """A longer request and more stop tokens make room; noise drawn before stays, a function of the seed."""
    slots = SlotArrays(3)
    slots.start(0, SamplingParams(2, 1.0, (5,)), seed=11, prompt=4, cached=1)
    early = slots.uniforms[0, :2].copy()
    slots.start(2, SamplingParams(9, 1.0, (5, 6, 7)), seed=11, prompt=3, cached=0)
    assert slots.uniforms[0, :2].tolist() == early.tolist() == slots.uniforms[2, :2].tolist()
    assert slots.stop.tolist() == [[5, -1, -1], [-1, -1, -1], [5, 6, 7]]
    assert slots.running.tolist() == [True, False, True]
    assert slots.feeding.tolist() == [3, 0, 3]
    slots.start(0, SamplingParams(2, 0.0), seed=1, prompt=4, cached=0)
    assert slots.stop[0].tolist() == [-1, -1, -1]
