"""The evaluations of a run, which worker 0 makes: on the validation split while it trains, on both at its ends, and on
the named sets of eval.sets at its ends and every so many steps of each.

Another worker 0, after a restart or in a resumed run, evaluates on the validation split again where a whole
eval.every has passed in the life of the one before. A named set may cost much more, so what of it was reported before
is not played again.
"""

from __future__ import annotations

import asyncio

from mgrpo.environments.task import Split
from mgrpo.pipeline.eval_sets import EvalSet, play_set, read_set
from mgrpo.pipeline.play import Accuracy, RolloutResult, evaluate
from mgrpo.pipeline.worker_context import WorkerContext, asked
from mgrpo.record import spans

EVAL_SEED = 0x65_76_61_6C  # evaluation noise is the same in every run and at every step
SET = "eval_set"  # the kind of a set's report


class Evaluations:
    """Plays with the weights that the engines hold: whoever calls it leaves them as they are meanwhile."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._evaluated = -1  # step of the last
        self._sets: list[EvalSet] = []

    def prepare(self) -> None:
        """Read the named sets, and what the store knows of them. Raises ConfigError naming a set that cannot be
        read."""
        context = self._context
        sets = context.config.eval.sets
        self._sets = [read_set(number, config, context.task) for number, config in enumerate(sets)]
        known, after = {s.config.name: s.played for s in self._sets}, -1
        while known and (page := context.store.reports(after=after)):
            after = page[-1].seq
            for report in page:
                if report.kind == SET and (played := known.get(str(report.payload.get("split")))) is not None:
                    played.add(int(report.payload.get("step", -1)))

    def due(self, step: int) -> bool:
        """Whether the weights of this step are to be evaluated before newer ones come."""
        return self._validation_due(step) or any(s.due(step) for s in self._sets)

    def _validation_due(self, step: int) -> bool:
        every = self._context.config.eval.every
        return step > 0 and step // every > max(0, self._evaluated) // every

    async def run_due(self, step: int) -> None:
        """Evaluate the weights of `step` on what is due."""
        if self._validation_due(step):
            await self.run("validation", step)
        for played in self._sets:
            if played.due(step):
                await self._run_set(played, step)

    async def run_sets(self, step: int) -> None:
        """Evaluate the weights of `step`, the run's first or last, on every named set."""
        for played in self._sets:
            if step not in played.played:
                await self._run_set(played, step)

    async def _run_set(self, played: EvalSet, step: int) -> None:
        context, config = self._context, played.config
        mode = "greedy" if config.greedy else "sampled"

        def seen(number: int, result: RolloutResult) -> None:
            if result.request.rollout == 0:  # one of a question's repeats is enough to look at
                question = asked(result.request.question)
                context.recorder.evaluation(
                    step,
                    config.name,
                    mode,
                    number,
                    question,
                    result.rollout,
                    result.failure,
                    result.kind or "",
                )

        with spans.span("evaluation", config.name, spans.EVALUATION_LANE, {"step": step}):
            result = await play_set(
                context.task,
                played,
                context.team.agents,
                step=step,
                seed=EVAL_SEED,
                seen=seen,
                accept=context.check_rewards,
                deadline=context.config.rollout.deadline,
            )
        played.played.add(step)
        report = {
            "step": step,
            "split": config.name,
            "mode": mode,
            "n": len(played.questions),
            "repeats": config.repeats,
            "avg": result.avg,
            "stderr": result.stderr,
            "failed": result.failed,
            "tags": dict(result.tags),
        }
        await asyncio.to_thread(context.store.report, SET, report)

    async def run(self, split: Split, step: int) -> None:
        """Evaluate the weights of `step`, greedy and sampled, and report it."""
        config, context = self._context.config.eval, self._context
        self._evaluated = step
        questions = context.task.questions(
            split, config.validation if split == "validation" else config.heldout
        )

        async def accuracy(mode: str) -> Accuracy:
            def seen(number: int, result: RolloutResult) -> None:
                question = asked(result.request.question)
                context.recorder.evaluation(
                    step, split, mode, number, question, result.rollout, result.failure, result.kind or ""
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
                place=f"{split}/{step}",
            )

        with spans.span("evaluation", split, spans.EVALUATION_LANE, {"step": step}):
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
