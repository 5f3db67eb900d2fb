"""The evaluations of a run, which worker 0 makes: on the validation split while it trains, on both at its ends."""

from __future__ import annotations

import asyncio

from mgrpo.environments.task import Split
from mgrpo.pipeline.play import Accuracy, RolloutResult, evaluate
from mgrpo.pipeline.worker_context import WorkerContext, asked, secret_id

EVAL_SEED = 0x65_76_61_6C  # evaluation noise is the same in every run and at every step


class Evaluations:
    """Plays with the weights that the engines hold: whoever calls it leaves them as they are meanwhile."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._evaluated = -1  # step of the last

    def due(self, step: int) -> bool:
        """Whether the weights of this step are to be evaluated before newer ones come."""
        every = self._context.config.eval.every
        return step > 0 and step // every > max(0, self._evaluated) // every

    async def run(self, split: Split, step: int) -> None:
        """Evaluate the weights of `step`, greedy and sampled, and report it."""
        config, context = self._context.config.eval, self._context
        self._evaluated = step
        questions = context.task.questions(
            split, config.validation if split == "validation" else config.heldout
        )

        async def accuracy(mode: str) -> Accuracy:
            def seen(number: int, result: RolloutResult) -> None:
                question = result.request.question
                context.recorder.evaluation(
                    step, split, mode, number, asked(question), result.rollout, secret_id(question)
                )

            return await evaluate(
                context.task,
                questions,
                context.team.agents,
                greedy=mode == "greedy",
                seed=EVAL_SEED,
                seen=seen,
                accept=context.check_rewards,
                deadline=context.config.rollout.deadline,
            )

        greedy, sampled = await accuracy("greedy"), await accuracy("sampled")
        report = {
            "step": step,
            "split": split,
            "n": len(questions),
            "greedy": greedy.mean,
            "sampled": sampled.mean,
            "failed": greedy.failed + sampled.failed,
            "d_k": {role: {str(d): n for d, n in sorted(h.items())} for role, h in sampled.calls.items()},
        }
        await asyncio.to_thread(context.store.report, "eval", report)
