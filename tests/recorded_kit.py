"""A research run whose every answer comes over HTTP: tiny policies whose words are tool calls, a search with pages, a
source of news, a judge and an expert, none of which answers the same request twice alike.

What the services say are words of the policies' vocabulary, so that another answer makes other tokens, and another
verdict other rewards: a replay that gets one of them wrong ends with other weights.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mgrpo.model.policy import Policy, save_policy
from mgrpo.record.reader import Recording
from tests.fake_services import Asked, FakeService
from tests.families import family
from tests.test_chat import CHATML

STEPS, QUESTIONS, GROUP = 3, 4, 4
CALLS = [
    *(("ask", {"task": f"task {i}"}) for i in range(6)),
    *(("search", {"query": query}) for query in ("red", "blue")),
    *(("visit", {"url": url}) for url in ("u0", "u1")),
    *(("news", {"query": f"of day {i}"}) for i in range(5)),
    *(("report", {"report": report}) for report in ("big", "small", "none")),
    *(("answer", {"answer": answer}) for answer in ("yes", "no", "both")),
]
FACTS = [f"fact{i}" for i in range(7)]  # what pages and news hold
CONFIG = """
seed = 5

[task]
name = "research"

[task.options]
format = "json"
limits = {{ turns = 4, asks = 2, calls = 2, turn_tokens = 4, answer_tokens = 4, observation_tokens = 64 }}
questions = {{ source = "jsonl", path = "{questions}", fractions = {{ validation = 0.2, heldout = 0.2 }} }}
cassette = {{ path = "{tape}", mode = "{mode}" }}
agents = {{ main = {{ prompt = "Call tools." }}, sub = {{ prompt = "Call tools." }} }}

[task.options.score]
rule = "exact"
expert = "judge"

[task.options.score.judge]
url = "{url}"
model = "judge"
calibration = 0.2

[task.options.score.expert_judge]
url = "{url}"
model = "judge"
calibration = 0.2

[task.options.tools.web]
type = "search_r1"
url = "{url}/web"
visit = true

[task.options.tools.press]
type = "search_r1"
url = "{url}/press"
pure = false
rename = {{ search = "news" }}
attempts = 2
backoff = 0.05
max_outage = {max_outage}

[agents.main]
model = "{model}"
max_length = 384
policy = {{ dtype = "float32" }}
reward = {{ gate = false, format = 0.1, correct = 0.9 }}
optimizer = {{ lr = 3e-3 }}

[agents.sub]
model = "{model}"
max_length = 384
d_max = 2
policy = {{ dtype = "float32" }}
reward = {{ gate = false, format = 0.1, outcome = 0.4, expert = 0.5 }}
optimizer = {{ lr = 3e-3 }}

[trainer]
steps = {steps}
questions = {n}
group_size = {k}
max_lag = 0

[rollout]
wait_for_calls = true

[eval]
every = 2
validation = 2
heldout = 2
start_validation = 0

[metrics]
sinks = []
"""


class Services(FakeService):
    """All of them on one port: /web (search and pages), /press, and the judge's /v1."""

    def __init__(self) -> None:
        super().__init__(self._said)
        self.times: Counter[str] = Counter()  # how often each of them was asked

    def _said(self, asked: Asked) -> object:
        self.times[asked.path] += 1
        n = self.times[asked.path]
        words = f"{FACTS[n % 7]} {FACTS[n % 5]}"
        if asked.path.endswith("/retrieve"):
            found = [{"document": {"id": f"u{i}", "contents": f"title\n{words}"}} for i in range(2)]
            return {"result": [found]}
        if asked.path.endswith("/access"):
            return {"result": [{"contents": f"title\n{words}"}]}
        said = {"verdict": "correct" if n % 3 else "incorrect", "score": n % 11}
        wanted = asked.json["response_format"]["json_schema"]["schema"]["required"]
        reply = {"reason": "so", **{name: said[name] for name in wanted if name in said}}
        return {"choices": [{"message": {"content": json.dumps(reply)}}]}


def write_model(folder: Path) -> Path:
    """Each call and each fact is one token."""
    calls = [json.dumps({"name": n, "arguments": a}, separators=(",", ":")) for n, a in CALLS]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["?", *calls, *FACTS])}, unk_token="?")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    words.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)], special_tokens=True)
    words.chat_template = CHATML
    save_policy(Policy(family("Llama", vocab_size=len(words), max_position_embeddings=512), words), folder)
    return folder


def write_questions(path: Path, word: str) -> Path:
    rows = [{"id": f"{word}{i}", "question": f"What about {word} {i}?", "answer": "gold"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(path: Path, url: str, **chosen: object) -> Path:
    """chosen: questions, tape, mode, model; max_outage."""
    given = {"url": url, "steps": STEPS, "n": QUESTIONS, "k": GROUP, "max_outage": 60, **chosen}
    path.write_text(CONFIG.format(**given))
    return path


def rollouts_of(out: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Rollout, evaluations included -> every trajectory with its tokens, mask, log-probs, versions and scores."""
    return {
        name: [
            (t.role, t.invocation, t.tokens, t.loss_mask, t.logprobs, t.version_min, t.versions, t.scores)
            for t in recorded.body().trajectories
        ]
        for name, recorded in Recording([out]).rollouts.items()
    }


def kinds_of(out: Path) -> dict[str, int]:
    """final or failed -> rollouts that the store has of it."""
    with contextlib.closing(sqlite3.connect(out / "store.db")) as database:
        return dict(database.execute("SELECT kind, count(*) FROM rollouts GROUP BY kind").fetchall())


def went_out(records: list[dict[str, Any]], what: str = "live") -> dict[str, float]:
    """Service -> the sum of one of its counters over a run's metrics, where it is not 0."""
    found: Counter[str] = Counter()
    for record in records:
        for name, value in record.items():
            if match := re.fullmatch(rf"service/(\w+)/{what}", name):
                found[match[1]] += value
    return {name: value for name, value in found.items() if value}


def outage(answered: int, failures: Iterator[str]) -> Any:
    """For FakeService.fault_of: after so many requests for news come these failures, one a request."""
    count = 0

    def fault(asked: Asked) -> str | None:
        nonlocal count
        if not asked.path.startswith("/press"):
            return None
        count += 1
        return next(failures, None) if count > answered else None

    return fault
