"""A run's record and metrics as a research task leaves them: tool calls, verdicts, failures by kind, services."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mgrpo.config.record import RecordConfig
from mgrpo.record.rollouts import Asked, RolloutRecorder
from mgrpo.types import Rollout, Trajectory

STEP = 50  # beyond those of the run that it is added to
DIGEST = "9f86d081884c7d65"


def agent(role: str, number: int, turns: int, versions: int = 5) -> Trajectory:
    """A trajectory of `turns` sampled turns of two tokens each, with two given tokens before every one."""
    ids = np.arange(4 * turns, dtype=np.int32) % 12
    mask = np.tile(np.array([0, 0, 1, 1], np.uint8), turns)
    return Trajectory(
        query=f"{STEP}/0", rollout=0, role=role, invocation=number, tokens=ids, loss_mask=mask,
        logprobs=-mask.astype(np.float32), versions=np.where(mask, versions, -1).astype(np.int32),
        scores={"format": 1.0} if role == "main" else {"format": 1.0, "expert": 0.5},
    )  # fmt: skip


def call(role: str, invocation: int, turn: int, tool: str, **changes: Any) -> dict[str, Any]:
    """One entry of info["tools"]."""
    return {
        "role": role, "invocation": invocation, "turn": turn, "tool": tool, "arguments": '{"query": "Fiji capital"}',
        "status": "ok", "source": "live", "seconds": 0.25, "digest": DIGEST, "chars": 1234,
    } | changes  # fmt: skip


CALLS = [
    call("main", 0, 0, "ask", arguments='{"task": "Find the capital of Fiji"}'),
    call("main", 0, 1, "ask", arguments='{"task": 7}', status="tool_error", chars=42),
    call("left", 0, 0, "search", source="cache", seconds=0.0),
    call("left", 0, 0, "search", status="empty", chars=11),
    call(
        "left", 0, 1, "visit", arguments='{"url": "https://example.org/fiji"}', source="replay", seconds=1.5
    ),
    call("left", 0, 9, "visit", arguments='{"url": "https://example.org/later"}'),
]
VERDICT = {
    "rule": "gaia",
    "rule_score": 0.0,
    "judge": "correct",
    "source": "cache",
    "digest": "abcdef0123456789",
}


def research(info: dict[str, Any], correct: float = 1.0) -> Rollout:
    """A rollout of main with two turns and one call of left with two."""
    main, left = agent("main", 0, 2), agent("left", 0, 2)
    return Rollout(
        f"{STEP}/0", 0, main, {"left": [left]}, correct, {"answer": "Suva", "opened_at": {"left": [4]}} | info
    )


def add_research(
    run: Path, calls: list[dict[str, Any]], question: str = "What is the capital of Fiji?"
) -> str:
    """Record rollouts 0 to 6 of group 50/0, all with one question: 0 with tool calls and a verdict, 1 without a failure
    and wrong, 2 to 5 failed, each of another kind, 6 the failed one of an older record. Returns the id of the first."""
    recorder = RolloutRecorder(RecordConfig(tokens_every=1), run / "rollouts" / "8", print)
    info = {"tools": calls, "verdict": VERDICT, "question_id": "fiji-1", "tags": {"level": "2"}}
    asked = Asked(question, "Suva")
    recorder.train(STEP, 0, f"{STEP}/0", 0, asked, research(info), "")
    recorder.train(STEP, 0, f"{STEP}/0", 1, asked, research({}, 0.0), "")
    for number, kind in enumerate(("infrastructure", "length", "deadline", "task", ""), 2):
        recorder.train(STEP, 0, f"{STEP}/0", number, asked, None, f"it was {kind} " + "x" * 30, kind)
    recorder.close()
    return f"{STEP}/0/0"


def add_secret(run: Path) -> tuple[str, list[str]]:
    """Record a secret rollout of training, and of an evaluation two questions at two steps. Returns their ids."""
    recorder = RolloutRecorder(RecordConfig(tokens_every=1), run / "rollouts" / "9", print)
    info = {"tools": CALLS, "verdict": VERDICT, "tags": {"level": "2"}}
    asked = Asked("hidden words", "hidden gold", "secret-7")
    recorder.train(STEP, 1, f"{STEP}/1", 0, asked, research(info), "")
    for step in (0, STEP):
        for number in (0, 1):
            recorder.evaluation(step, "gaia", "sampled", number, asked, research(info, float(step > 0)))
    recorder.close()
    ids = [f"eval/gaia/{step}/sampled/{number}/0" for step in (0, STEP) for number in (0, 1)]
    return f"{STEP}/1/0", ids


def add_metrics(run: Path) -> None:
    """Append reports of two workers at steps 1 and 2, and evaluations of two sets."""
    lines: list[dict[str, float]] = []
    for step in (1, 2):
        for worker in (0, 1):
            lines.append(
                {
                    "step": step, "time": 10.0 * step + worker, "seq": 9000 + 10 * step + worker,
                    "service/search/calls": 10.0 * step, "service/search/live": 6.0 * step,
                    "service/search/cache": 4.0 * step, "service/search/seconds": 3.0 * step,
                    "service/search/retries": 1.0, "service/judge/calls": 2.0, "service/judge/live": 2.0,
                    "service/judge/tokens_in": 400.0, "service/judge/seconds": 5.0,
                    "rollout/tool/search/seconds": 0.5, "rollout/tool/search/seconds_median": 0.25,
                    "rollout/tool/search/seconds_p95": 2.0 * step, "rollout/tool/search/calls": 3.0,
                    "rollout/tool/search/retries": 0.0, "rollout/tool/search/failures": 0.5,
                    "rollout/tool/visit/seconds": 1.0, "rollout/tool/visit/seconds_median": 0.75,
                    "rollout/tool/visit/seconds_p95": 3.0, "rollout/tool/visit/calls": 2.0,
                    "rollout/failed_by_infrastructure": 2.0 * step, "rollout/failed_by_length": 0.0,
                }
            )  # fmt: skip
    lines[-1] |= {
        "service/search/failures": 3.0,
        "service/search/outages": 1.0,
        "service/search/waited": 65.0,
    }
    for step, value in ((0, 0.25), (6, 0.4), (12, 0.5)):
        for name, more in (("gaia", 0.0), ("webwalker", 0.2)):
            lines.append(
                {
                    "step": step, "time": 2.0 * step, "seq": 9100 + len(lines), f"eval/{name}/avg": value + more,
                    f"eval/{name}/stderr": 0.05, f"eval/{name}/failed": 1.0,
                    f"eval/{name}/level-1/avg": value, f"eval/{name}/level-2/avg": value / 2,
                }
            )  # fmt: skip
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
