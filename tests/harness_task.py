"""A harness with a tiny policy, for whole runs: two sub-agents name digits, main names one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mgrpo.environments.task import Question, Split
from mgrpo.gateway.harness import Access, HarnessTask, Score
from mgrpo.model.policy import Policy, save_policy
from tests.families import family
from tests.harness_kit import ask
from tests.test_chat import CHATML

DIGITS = [str(n) for n in range(4)]


class DigitsTask(HarnessTask):
    """See the module's docstring."""

    scores = {"main": frozenset({"format"}), "sub": frozenset({"format"})}  # noqa: RUF012

    async def run(self, question: Question, base_url: Access) -> object:
        said = await asyncio.gather(*(ask(base_url, "sub", word) for word in question.text.split()))
        return {"subs": list(said), "main": await ask(base_url, "main", " ".join(said) or "0")}

    def score(self, question: Question, answer: Any) -> Score:
        main, subs = answer["main"], answer["subs"]
        formats = {"main": {"format": _format(main)}, "sub": {"format": min(map(_format, subs))}}
        return Score(float(question.answer in main.split()), formats)

    def question(self, index: int, seed: int) -> Question:
        return Question(f"{index % 4} {(index + seed) % 4}", str(index % 4), id=f"q{index}")

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        return [self.question(index, seed) for index in range(n)]

    def build_policy(self, role: str, seed: int, path: str) -> None:
        tokenizer = digits_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = family("Llama", vocab_size=len(tokenizer), max_position_embeddings=256)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_policy(Policy(model, tokenizer), path)


def digits_tokenizer() -> Any:
    """One token a digit, everything else is unknown."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *DIGITS])}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    made.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)], special_tokens=True)
    made.chat_template = CHATML
    return made


def _format(text: str) -> float:
    """Whether it holds a digit, and not zero where it holds none: a gate would leave nothing to learn."""
    return 1.0 if set(text.split()) & set(DIGITS) else 0.5
