"""What the run page shows, as plain JSON: read from the record, the metrics and the summary, computed nowhere else.

Rewards, group means and deviations, advantages, multiplicities and weights are the numbers that the trainers recorded
when they used them.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgrpo.config.reward import RewardConfig
from mgrpo.credit import StageRewards, is_gated, reward_parts
from mgrpo.errors import ConfigError, CorruptionError
from mgrpo.metrics import read_metrics
from mgrpo.record.reader import RecordedRollout, Recording
from mgrpo.record.schema import RolloutHead, StepBody, TrajectoryRecord
from mgrpo.record.segments import Frame
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.run.summary import read_summary
from mgrpo.view.span_timeline import SpanTimeline
from mgrpo.view.timeline import shares, timeline
from mgrpo.view.transcript import labels, tool_calls, verdict

HIDDEN = ("seq", "step", "time")
COLUMNS = ("id", "text", "gold", "answer", "step", "split", "mode", "ok", "correct", "tokens", "failed_by",
           "tool_errors", "redacted")  # fmt: skip
COUNTERS = "service/"
"""What begins the names of metrics that count what was added since the report before: they are summed."""
Json = dict[str, Any]


class RunView:
    """One run as the page sees it. Thread-safe; every call sees what has been recorded up to now."""

    def __init__(self, run: Path) -> None:
        self.run, self.config = run, recorded_run(run)
        self._folder, self._rewards = RunFolder(run), StageRewards(self.config)
        self._lock = threading.Lock()
        self._recording = Recording([run])
        self._texts = Texts(self._recording)
        self._spans, self._spans_lock = SpanTimeline(run), threading.Lock()
        self._credit: dict[tuple[str, int], _Credit] = {}

    def overview(self, have: int = 0) -> Json:
        """Everything but trees and timeline: settings, curves, and a line for each rollout from number `have` on."""
        with self._lock:
            self._recording.refresh()
            return {
                "title": str(self.run),
                "settings": self._settings(),
                "summary": self._summary(),
                "series": self._series(),
                "notes": self._recording.notes() + self._spans.notes(),
                "live": self._folder.live,
                "steps": {
                    role: sorted(step for r, step in self._recording.steps if r == role)
                    for role in self.config.roles
                },
                "rollouts": self._lines(have),
            }

    def timeline(self) -> Json:
        """The last steps, from spans where they were recorded (None: there is no step yet), and what they were made
        of. It keeps no other call waiting."""
        found = timeline(read_metrics(self.run), self.config.training_roles)
        with self._spans_lock:
            drawn = self._spans.read(found, self._recording.rollouts.__contains__)
        if drawn is None and found is not None:
            drawn = found.as_json()
        return {"timeline": drawn, "shares": shares(found) if found else {}}

    def step(self, role: str, step: int) -> Json:
        """The alignment of one step of one role. Raises ConfigError when it is not in the record."""
        with self._lock:
            self._recording.refresh()
            credit = self._credit_of(role, step)
            if credit is None:
                raise ConfigError(f"step {step} of {role} is not in the record")
            return self._alignment(role, step, credit)

    def rollout(self, rollout_id: str) -> Json:
        """The tree of one rollout. Raises ConfigError when it is not in the record."""
        with self._lock:
            self._recording.refresh()
            found = self._recording.rollouts.get(rollout_id)
            if found is None:
                raise ConfigError(f"rollout {rollout_id!r} is not in the record")
            try:
                return self._tree(found)
            except CorruptionError as error:
                raise ConfigError(f"rollout {rollout_id!r} cannot be shown: {error}") from None

    def ids(self) -> list[str]:
        """Every recorded rollout."""
        return list(self._recording.rollouts)

    # -- overview ------------------------------------------------------------------------------------------------

    def _settings(self) -> Json:
        config = self.config
        return {
            "task": config.task.label,
            "seed": config.seed,
            "roles": list(config.roles),
            "frozen": [r for r in config.roles if r not in config.training_roles],
            "d_max": {r: config.agents[r].d_max for r in config.sub_roles},
            "alignment": {r: config.agents[r].alignment.mode for r in config.roles},
            "k": config.trainer.group_size,
            "questions": config.trainer.questions,
            "steps": config.trainer.steps,
        }

    def _summary(self) -> Json | None:
        return read_summary(self.run) or None

    def _series(self) -> dict[str, list[list[float]]]:
        """Name -> [[step, value, seconds], ...]; a step that was reported again counts once, the last time. Counters of
        services are the sum of all that was reported at a step, by several workers or again after a restart."""
        points: dict[str, dict[int, list[float]]] = {}
        for record in read_metrics(self.run):
            step, seconds = int(record["step"]), float(record["time"])
            for name, value in record.items():
                if value is None or name in HIDDEN:
                    continue
                known = points.setdefault(name, {})
                before = known[step][1] if step in known and name.startswith(COUNTERS) else 0.0
                known[step] = [step, before + value, seconds]
        return {name: [found[s] for s in sorted(found)] for name, found in sorted(points.items())}

    def _lines(self, have: int) -> Json:
        """One line a rollout, as columns; questions once for each group."""
        entries = list(self._recording.rollouts.values())
        roles = self.config.roles
        texts: dict[str, int] = {}
        out: Json = {
            "from": have, "total": len(entries), "texts": [],
            **{name: [] for name in COLUMNS},
            "d_k": {role: [] for role in roles[1:]},
            "reward": {role: [] for role in roles},
            "advantage": {role: [] for role in roles},
        }  # fmt: skip

        def text(value: str) -> int:
            return texts.setdefault(value, len(texts))

        for entry in entries[have:]:
            head = entry.head
            out["id"].append(head.id)
            out["text"].append(text(head.question))
            out["gold"].append(text(head.gold))
            out["answer"].append(text(head.answer))
            out["step"].append(head.step)
            out["split"].append(text(head.split))
            out["mode"].append(text(head.mode))
            out["ok"].append(int(head.status == "ok"))
            out["correct"].append(head.correct)
            out["tokens"].append(sum(head.tokens.values()))
            out["failed_by"].append(text(head.failed_by))
            out["tool_errors"].append(head.tool_errors)
            out["redacted"].append(int(head.redacted))
            for role in roles[1:]:
                out["d_k"][role].append(head.d_k.get(role, 0))
            for role in roles:
                credit = self._credit_near(role, entry)
                reward, advantage = credit.means(head.query, head.rollout) if credit else (None, None)
                out["reward"][role].append(reward)
                out["advantage"][role].append(advantage)
        out["texts"] = list(texts)
        return out

    # -- credit --------------------------------------------------------------------------------------------------

    def _credit_of(self, role: str, step: int) -> _Credit | None:
        record = self._recording.steps.get((role, step))
        if record is None:
            return None
        known = self._credit.get((role, step))
        if known is None or known.frame != record.frame:
            try:
                known = self._credit[role, step] = _Credit(record.body(), record.frame)
            except CorruptionError:  # damaged, or deleted to keep the record within its bound
                return None
        return known

    def _credit_near(self, role: str, entry: RecordedRollout) -> _Credit | None:
        """What `role` made of a rollout's group; an asynchronous trainer may have taken it some steps later."""
        if entry.head.split != "train":
            return None
        reach = 2 * self.config.trainer.max_lag
        near = entry.head.step
        for step in sorted(range(near - reach, near + reach + 1), key=lambda s: abs(s - near)):
            credit = self._credit_of(role, step)
            if credit is not None and entry.head.query in credit.groups:
                return credit
        return None

    def _alignment(self, role: str, step: int, credit: _Credit) -> Json:
        body = credit.body
        groups = []
        for number, query in enumerate(body.queries):
            members = np.flatnonzero(credit.table["group"] == number)
            played = credit.table["rollout"][members]
            heads = {r.head.rollout: r.head for r in self._recording.group(query, body.k)}
            failed = {k for g, k in body.failed if g == number}
            rollouts = [
                {
                    "id": f"{query}/{k}",
                    "failed": k in failed,
                    "correct": heads[k].correct if k in heads else None,
                    "invocations": [credit.numbers(member) for member in members[played == k]],
                }
                for k in range(body.k)
            ]
            groups.append(
                {
                    "query": query,
                    "question": next((h.question for h in heads.values()), ""),
                    "redacted": any(h.redacted for h in heads.values()),
                    "mean": body.mean[number],
                    "std": body.std[number],
                    "rollouts": rollouts,
                }
            )
        minibatches = [m.denominator for m in body.minibatches]
        return {
            "role": role, "step": step, "groups": groups, "minibatches": minibatches, "metrics": body.metrics,
            "mode": self.config.agents[role].alignment.mode, "d_max": self.config.agents[role].d_max,
            "tokens": credit.tokens(),
        }  # fmt: skip

    # -- trees ---------------------------------------------------------------------------------------------------

    def _tree(self, entry: RecordedRollout) -> Json:
        head, body = entry.head, entry.body()
        opened = body.info.get("opened_at")
        at: Mapping[str, Sequence[int]] = opened if isinstance(opened, dict) else {}
        trajectories = []
        for t in body.trajectories:
            credit = self._credit_near(t.role, entry)
            places = at.get(t.role, ())
            trajectories.append(
                {
                    "role": t.role,
                    "invocation": t.invocation,
                    "parts": self._parts(t, head),
                    "gated": is_gated(self._reward_of(t.role, head), t.scores),
                    "tokens": t.n,
                    "versions": [t.version_min, t.version_max],
                    "turns": self._texts.turns(t),
                    "opened_at": places[t.invocation] if t.invocation < len(places) else None,
                    "credit": credit.of(head.query, head.rollout, t.invocation) if credit else None,
                }
            )
        info = body.info
        return {
            "id": head.id, "question": head.question, "gold": head.gold, "answer": head.answer,
            "correct": head.correct, "status": head.status, "failure": body.failure, "step": head.step,
            "split": head.split, "mode": head.mode, "trajectories": trajectories,
            "failed_by": head.failed_by, "redacted": head.redacted, "tools": tool_calls(info),
            "verdict": verdict(info), **labels(info),
        }  # fmt: skip

    def _reward_of(self, role: str, head: RolloutHead) -> RewardConfig:
        """What the rollout's stage of the curriculum pays."""
        rewards = self._rewards
        return rewards.of_group(role, head.index) if head.split == "train" else rewards.of_evaluation(role)

    def _parts(self, t: TrajectoryRecord, head: RolloutHead) -> list[Json]:
        """What the reward of a trajectory is made of, scores that are not paid included."""
        parts = reward_parts(t.role, self._reward_of(t.role, head), t.scores, head.correct)
        named = {p.name for p in parts}
        return [{"name": p.name, "weight": p.weight, "score": p.score} for p in parts] + [
            {"name": name, "weight": 0.0, "score": score}
            for name, score in t.scores.items()
            if name not in named
        ]


class _Credit:
    """One recorded step of one role, ready to be asked about rollouts."""

    def __init__(self, body: StepBody, frame: Frame) -> None:
        self.body, self.frame, self.table = body, frame, body.table()
        self.groups = {query: number for number, query in enumerate(body.queries)}
        shared = np.frombuffer(body.shared, "<i4")
        self._shared = shared if len(shared) == len(self.table) else None  # None: not recorded
        cells = self.table["group"] * max(1, body.k) + self.table["rollout"]
        size = len(body.queries) * max(1, body.k)
        kept = self.table["multiplicity"] > 0
        self._reward = _cell_means(cells, self.table["reward"], size)
        self._advantage = _cell_means(cells[kept], self.table["advantage"][kept], size)

    def means(self, query: str, rollout: int) -> tuple[float | None, float | None]:
        """(mean reward, mean advantage of the kept) of a rollout's trajectories; None without any."""
        cell = self.groups[query] * self.body.k + rollout
        return self._reward[cell], self._advantage[cell]

    def of(self, query: str, rollout: int, invocation: int) -> Json | None:
        group = self.groups[query]
        table = self.table
        mine = np.flatnonzero(
            (table["group"] == group) & (table["rollout"] == rollout) & (table["invocation"] == invocation)
        )
        if not len(mine):
            return None
        statistics = {"mean": self.body.mean[group], "std": self.body.std[group]}
        return self.numbers(int(mine[0])) | statistics

    def numbers(self, number: int) -> Json:
        """Row `number` of the step. `shared`: tokens that another row of its micro-batch computed; None in records that
        do not say."""
        row = self.table[number]
        names = (
            "invocation",
            "reward",
            "multiplicity",
            "weight",
            "length",
            "active",
            "minibatch",
            "version_min",
        )
        kept = bool(row["multiplicity"] > 0)
        return {name: row[name].item() for name in names} | {
            "advantage": float(row["advantage"]) if kept else None,
            "shared": None if self._shared is None else int(self._shared[number]),
        }

    def tokens(self) -> Json | None:
        """Tokens of the step that its forward passes computed, and that they had not to: they are shared. None in
        records that do not say."""
        computed = sum(m.computed_tokens for m in self.body.minibatches)
        shared = sum(m.shared_tokens for m in self.body.minibatches)
        return {"computed": computed, "shared": shared} if computed and self._shared is not None else None


def _cell_means(cells: npt.NDArray[np.int32], values: npt.NDArray[Any], size: int) -> list[float | None]:
    count = np.bincount(cells, minlength=size)
    total = np.bincount(cells, weights=values.astype(np.float64), minlength=size)
    return [float(t / n) if n else None for t, n in zip(total, count, strict=True)]


class Texts:
    """Token ids as text, by the tokenizers that the workers kept; without the library or the file, as numbers."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._known: dict[str, Any] = {}

    def turns(self, trajectory: TrajectoryRecord) -> list[Json]:
        """A trajectory as stretches of sampled and given text; [] where its tokens were not kept. `segment`: number of
        the one that a stretch begins, from 2 on; None in the middle of one."""
        if not trajectory.tokens:
            return []
        ids = np.frombuffer(trajectory.tokens, "<i4")
        mask = np.frombuffer(trajectory.loss_mask, np.uint8)
        logprobs = np.frombuffer(trajectory.logprobs, "<f4")
        borders = {start: number for number, start in enumerate(trajectory.segment_starts[1:], 2)}
        cuts = sorted({0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), *borders, len(ids)})
        turns = []
        for first, last in itertools.pairwise(cuts):
            sampled = bool(mask[first])
            turns.append(
                {
                    "sampled": sampled,
                    "from": first,
                    "tokens": last - first,
                    "segment": borders.get(first),
                    "text": self._text(trajectory.role, ids[first:last].tolist()),
                    "logprob": float(logprobs[first:last].sum(dtype=np.float64)) if sampled else None,
                }
            )
        return turns

    def _text(self, role: str, ids: list[int]) -> str:
        if role not in self._known:
            self._known[role] = self._load(role)
        tokenizer = self._known[role]
        if tokenizer is None:
            return " ".join(map(str, ids))
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    def _load(self, role: str) -> Any:
        path = self._recording.tokenizers().get(role)
        if path is None:
            return None
        try:
            from tokenizers import Tokenizer
        except ImportError:  # an extra
            return None
        try:
            return Tokenizer.from_file(str(path))
        except Exception:  # the library's own, of a file that a power cut has emptied
            return None
