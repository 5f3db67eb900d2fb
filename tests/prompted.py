"""The relay with a question as long as real ones are against their answers, so that its rollouts share a prefix, and
with a policy that computes it once."""

from __future__ import annotations

from mgrpo.environments.task import Question
from mgrpo.model.policy import save_policy
from tests.models import tiny_policy
from tests.relay import ROLES, RelayTask

WORDS = 24


class PromptedTask(RelayTask):
    """Questions of WORDS tokens, Llamas as policies."""

    def question(self, index: int, seed: int) -> Question:
        words = " ".join(f"w{1 + (index * 7 + seed + n) % 60}" for n in range(WORDS))
        return Question(words, answer="even", info={"index": index})

    def build_policy(self, role: str, seed: int, path: str) -> None:
        save_policy(tiny_policy("llama", seed * 10 + ROLES.index(role)), path)
