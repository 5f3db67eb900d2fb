"""The relay played by tiny mixtures of experts."""

from __future__ import annotations

from mgrpo.model.policy import Policy, save_policy
from tests.families import family
from tests.models import tiny_tokenizer
from tests.relay import ROLES, RelayTask

EXPERTS, TOP_K = 8, 2


class MoeRelay(RelayTask):
    """options: the relay's."""

    def build_policy(self, role: str, seed: int, path: str) -> None:
        shape = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "initializer_range": 0.3}
        policy = Policy(family("Qwen3Moe", seed * 10 + ROLES.index(role), **shape), tiny_tokenizer(), role)
        save_policy(policy, path)
