"""The log-probs of a fixed prompt, by which an engine's weights are told from others: a wrong head, a version that is
not the one its label names, an expert in the wrong place all move them by far more than rounding does.

They are computed in float32 whatever the policy trains in, so that what an engine's own precision adds is the only
difference, and over all rows of the head, as servers compute the log-probs of a prompt.
"""

from __future__ import annotations

import torch

from mgrpo.errors import NumericsError
from mgrpo.model.policy import Policy
from mgrpo.ops.selective_logprob import selective_logprob
from mgrpo.types import Probe

PROBE_TOKENS = 32
_GOLDEN = 0.6180339887498949  # its multiples modulo 1 lie far from each other


def probe_ids(policy: Policy, longest: int) -> tuple[int, ...]:
    """The prompt: up to PROBE_TOKENS ids spread over the policy's vocabulary, the same for every process. Added tokens
    have no part where there are others: some stand for things that are no text. longest: tokens that an engine takes,
    the one that it would sample included."""
    count = min(PROBE_TOKENS, longest - 1, policy.context_length or PROBE_TOKENS)
    vocabulary, added = policy.vocabulary, set(getattr(policy.tokenizer, "added_tokens_decoder", ()))
    spread = [int((i + 1) * _GOLDEN % 1 * vocabulary.size) for i in range(8 * PROBE_TOKENS)]
    ids = vocabulary.tokens(torch.tensor(spread)).tolist()
    found = [i for i in ids if i not in added] or ids
    return tuple((found * PROBE_TOKENS)[: max(count, 2)])


def probe(policy: Policy, token_ids: tuple[int, ...]) -> Probe:
    """What `policy` says of the prompt `token_ids` now. A collective where the policy lies on several ranks. Raises
    NumericsError where a log-prob is not finite."""
    ids = torch.tensor(token_ids, device=policy.device)
    with torch.no_grad(), policy.full_precision():
        hidden = policy.hidden(ids[None, :-1])[0]
        found = selective_logprob(hidden, policy.head_weight, ids[1:])[0]
    if not bool(found.isfinite().all()):
        raise NumericsError(
            f"{policy.name}: {int((~found.isfinite()).sum())} of {len(found)} log-probs of a fixed prompt are not "
            "finite: the weights are damaged, so they are not published"
        )
    return Probe(token_ids, tuple(found.tolist()))
