"""The in-process engine and the training step on the token-shift decoder of the embedded demonstration.

    python -m bench.bench_engine [--quick] [--json out.json]
    python -m bench.bench_engine --model models/smollm2      # a real language model instead (make smollm2-model)

One thread, CPU time of it. Rival of the engine: transformers' generate on the same model and prompts, which
also samples from the full distribution but returns no log-probs. Rival of the training step: one padded
forward. With --model: 50 chat prompts, greedy against generate token for token, sampled log-probs against the
trainer's, and the speed of 32 prompts at once over one by one.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from bench.common import Comparison, Report, interleave, parser
from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.model.chat import ChatFormat
from mgrpo.model.loading import load_policy
from mgrpo.model.policy import Policy
from mgrpo.tasks.atlas.decoder import ShiftDecoderConfig, ShiftDecoderForCausalLM
from mgrpo.trainers.batch import MicroBatch
from mgrpo.trainers.torch.learner import logprobs_of

PROMPT, NEW = 20, 40
ROWS = 96


def policy() -> Policy:
    torch.manual_seed(0)
    config = ShiftDecoderConfig()
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    return Policy(ShiftDecoderForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=words))


def decode(report: Report, rounds: int) -> None:
    """Tokens per second of whole generations, prefill included."""
    ours = policy()
    loop = asyncio.new_event_loop()
    for batch in (1, 8, 32, 96):
        prompts = np.random.default_rng(batch).integers(0, ours.vocab_size, (batch, PROMPT))
        engine = HfEngine(ours)

        def served(engine: HfEngine = engine, prompts: np.ndarray = prompts) -> None:
            params = SamplingParams(NEW)
            jobs = [engine.generate(p, params, seed=i) for i, p in enumerate(prompts.tolist())]
            loop.run_until_complete(_all(jobs))

        def rival(prompts: np.ndarray = prompts) -> None:
            ids = torch.from_numpy(prompts)
            ours.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
            )

        times = interleave({"engine": served, "generate": rival}, rounds)
        rate = batch * NEW / times["engine"].median * 1e3
        target = {"at_least": 20_000} if batch == 96 else {}
        report.figure(f"engine, batch {batch}", rate, "tokens/s", **target)
        report.figure(f"generate, batch {batch}", batch * NEW / times["generate"].median * 1e3, "tokens/s")
        against = Comparison.of(times, "engine", "generate")
        report.compare(f"engine over generate, batch {batch}", against)
    loop.close()


async def _all(jobs: list[Coroutine[Any, Any, object]]) -> None:
    await asyncio.gather(*jobs)


def turns(report: Report, rounds: int) -> None:
    """Sampled tokens per second of 96 rollouts in sessions: three or four turns, tool results between."""
    ours = policy()
    loop = asyncio.new_event_loop()
    engine = HfEngine(ours)
    sampled = 0

    async def rollout(i: int) -> None:
        nonlocal sampled
        ids = [i % 7, 1, 2, 3, 4]
        plan = [(3, 4), (3, 10 + i % 6), (3, 10 + i % 5), (4, 0)]
        for turn, (say, get) in enumerate(plan if i % 3 == 0 else [plan[0], *plan[2:]]):
            out = await engine.generate(ids, SamplingParams(say), seed=turn, session=str(i))
            ids += out.token_ids.tolist() + [5] * get
            sampled += say
        engine.release(str(i))

    def wave() -> None:
        loop.run_until_complete(_all([rollout(i) for i in range(ROWS)]))

    wave()
    tokens, sampled = sampled, 0
    times = interleave({"wave": wave}, rounds)
    report.figure("engine, 96 rollouts in turns", tokens / times["wave"].median * 1e3, "tokens/s")
    loop.close()


def train(report: Report, rounds: int) -> None:
    """A supervised step (forward, backward, clip, AdamW) on 96 rows as long as the sub-agent's are."""
    rng = np.random.default_rng(0)
    lengths = torch.from_numpy(rng.choice([21, 27, 31, 36, 52], ROWS, p=[0.25, 0.15, 0.15, 0.2, 0.25]))
    ids = torch.from_numpy(rng.integers(0, 976, (ROWS, int(lengths.max()))))
    inside = torch.arange(1, ids.shape[1])[None] < lengths[:, None]
    scored = inside & torch.from_numpy(rng.random(inside.shape) < 0.35)
    targets = ids[:, 1:][scored]

    def step(hidden: Callable[[Policy], torch.Tensor]) -> Callable[[], None]:
        learner = policy()
        parameters = list(learner.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, foreach=True)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(hidden(learner) @ learner.head_weight.T, targets).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()

        return run

    times = interleave(
        {
            "hidden_before": step(lambda p: p.hidden_before(ids, lengths, scored)),
            "padded": step(lambda p: p.hidden(ids, lengths)[:, :-1][scored]),
        },
        rounds,
    )
    report.figure("training step, 96 demonstrations", times["hidden_before"].median, "ms", at_most=85)
    report.figure("training step", 1e3 / times["hidden_before"].median, "steps/s")
    against = Comparison.of(times, "hidden_before", "padded")
    report.compare("training step over one padded forward", against)


TOPICS = ["tea", "rain", "ships", "copper", "bread", "music", "frogs", "glass", "trains", "maps"]
ASKS = [
    "What is {}?",
    "Write one sentence about {}.",
    "Name three facts about {}.",
    "Who invented {}?",
    "Count {} to five please, and explain why you count that way.",
]
CHAT_NEW = 20  # tokens a reply


def language_model(report: Report, rounds: int, path: str) -> None:
    """A model with a chat template: is the engine right, and does a batch pay?"""
    ours = load_policy(path)
    chat = ChatFormat(ours.tokenizer)
    prompts = [
        chat.begin([{"role": "user", "content": ask.format(topic)}]) for ask in ASKS for topic in TOPICS
    ]
    loop = asyncio.new_event_loop()
    engine = HfEngine(ours, slots=64, max_length=512)

    def replies(which: list[list[int]], params: SamplingParams) -> list[Generation]:
        jobs = [engine.generate(p, params, seed=i) for i, p in enumerate(which)]
        return loop.run_until_complete(_gathered(jobs))

    greedy = replies(prompts, SamplingParams(CHAT_NEW, 0.0))
    differing = sum(
        out.token_ids.tolist() != _generated(ours, prompt)
        for prompt, out in zip(prompts, greedy, strict=True)
    )
    report.figure("greedy replies that differ from generate's", differing, "of 50", at_most=0)
    sampled = replies(prompts, SamplingParams(CHAT_NEW, 1.0))
    batch = _batch(prompts, sampled)
    difference = (logprobs_of(ours, batch, 1.0) - batch.active().rollout_logprobs).abs().max()
    report.figure("log-probs, engine against trainer", float(difference), "nats", at_most=1e-4)

    params = SamplingParams(CHAT_NEW, 1.0)
    few = prompts[:4]  # one by one takes long, and each as long as the next
    times = interleave(
        {
            "at once": lambda: replies(prompts[:32], params),
            "one by one": lambda: [replies([p], params) for p in few],
        },
        rounds,
    )
    at_once = 32 * CHAT_NEW / times["at once"].median * 1e3
    alone = len(few) * CHAT_NEW / times["one by one"].median * 1e3
    report.figure("engine, 32 at once", at_once, "tokens/s")
    report.figure("engine, one by one", alone, "tokens/s")
    against = Comparison(at_once, {"one by one": alone}, unit="tokens/s", more_is_better=True)
    report.compare("32 at once over one by one", against, at_least=3)
    loop.run_until_complete(engine.close())
    loop.close()


async def _gathered(jobs: list[Coroutine[Any, Any, Generation]]) -> list[Generation]:
    return list(await asyncio.gather(*jobs))


def _generated(policy: Policy, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = policy.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=CHAT_NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in out[0, len(prompt) :]]


def _batch(prompts: list[list[int]], replies: list[Generation]) -> MicroBatch:
    """Prompts with their replies as a trainer gets them."""
    lengths = [len(p) + len(r.token_ids) for p, r in zip(prompts, replies, strict=True)]
    shape = len(prompts), max(lengths)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    logprobs = torch.zeros(shape)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        said = slice(len(prompt), lengths[row])
        ids[row, : len(prompt)] = torch.tensor(prompt)
        ids[row, said] = torch.from_numpy(reply.token_ids.astype(np.int64))
        logprobs[row, said] = torch.from_numpy(reply.logprobs)
        mask[row, said] = True
    ones = torch.ones(len(prompts))
    return MicroBatch(ids, mask, logprobs, torch.tensor(lengths), ones, ones)


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", metavar="PATH", help="folder of a language model with a chat template")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    rounds = 5 if args.quick else 15
    if args.model:
        report = Report("bench_engine_language_model")
        language_model(report, 1 if args.quick else 5, args.model)
        return report.finish(args)
    report = Report("bench_engine")
    for part in (decode, turns, train):
        part(report, rounds)
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
