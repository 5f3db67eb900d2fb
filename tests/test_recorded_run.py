"""Whole research runs over services: recorded once a run replays bit-equal without them; an outage costs it nothing,
and one that lasts too long ends it by name, from where it goes on at another address."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.recorded_kit import (
    GROUP,
    QUESTIONS,
    STEPS,
    Services,
    kinds_of,
    outage,
    rollouts_of,
    went_out,
    write_config,
    write_model,
    write_questions,
)
from tests.runs import (
    command,
    final_weights,
    leftovers,
    records,
    resume,
    started,
    steps_of,
    summary,
    train,
)

ROLLOUTS = STEPS * QUESTIONS * GROUP
EVALUATIONS = 5  # at the start and the end two splits, between them one, each with 2 questions in 2 modes
SERVICES = {"web", "press", "judge", "expert"}


class Recorded(NamedTuple):
    """folder: models, questions, cassette. ended: what the first life printed at its end. url: of the first services,
    which nobody serves any more."""

    folder: Path
    ended: str
    url: str

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def config(self, name: str, **chosen: object) -> Path:
        files = {key: self.folder / file for key, file in FILES.items()}
        return write_config(self.folder / f"{name}.toml", self.url, **{**files, "mode": "replay", **chosen})


FILES = {"model": "model", "questions": "questions.jsonl", "tape": "tape.sqlite"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A run that records, in two lives: the news are down for longer than their max_outage. Resumed at another address
    and with more patience, they are down again for eight requests. No service is left afterwards."""
    folder = tmp_path_factory.mktemp("recorded")
    write_model(folder / "model")
    write_questions(folder / "questions.jsonl", "rivers")
    with Services() as services:
        services.fault_of = outage(8, itertools.repeat("503"))
        run = Recorded(folder, "", services.url)
        config = run.config("record", mode="cached", max_outage=0.5)
        output = end_of(command("train", str(config), "--out", str(run.out)))
    assert steps_of(run.out) < STEPS and summary(run.out)["outcome"] == "failed"
    with Services() as moved:
        moved.fault_of = outage(1, iter(["503"] * 8))
        places = {"tools.web": f"{moved.url}/web", "tools.press": f"{moved.url}/press"}
        places |= {"score.judge": moved.url, "score.expert_judge": moved.url}
        sets = [f"task.options.{service}.url={url}" for service, url in places.items()]
        resume(run.out, "task.options.tools.press.max_outage=60", *sets)
        assert moved.requests
    return run._replace(ended=output)


def end_of(arguments: list[str]) -> str:
    """The output of a run that ends with status 2: for a reason that it says."""
    with started(arguments) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    return output


def test_outages_cost_a_run_nothing(recorded: Recorded) -> None:
    """The one that lasts ends it by the service's name and address. Resumed elsewhere it waits for the short one, and
    every rollout is there: none has failed, and no request has, which would have spent an attempt."""
    out = recorded.out
    assert (
        f"service 'press' at {recorded.url}/press" in recorded.ended
        and "max_outage = 0.5 s" in recorded.ended
    )
    assert summary(out)["outcome"] == "finished" and steps_of(out) == STEPS
    assert kinds_of(out) == {"final": ROLLOUTS} and leftovers(out) == []
    lines = records(out)
    assert sum(record.get("rollout/failed", 0) for record in lines) == 0
    assert "answers again after" in (out / "logs" / "rollout-0.log").read_text()
    assert went_out(lines).keys() == SERVICES and went_out(lines, "failures") == {}


def test_a_recorded_run_replays_bit_equal_without_its_services(recorded: Recorded) -> None:
    """Weights, and tokens, log-probs and scores of every rollout of training and evaluations, each in its first attempt
    (another has another seed); nobody is at the addresses any more, and nothing went out."""
    out = recorded.folder / "again"
    train(recorded.config("replay"), out)
    lines = records(out)
    assert went_out(lines, "(live|retries|failures|outages)") == {}
    assert went_out(lines, "replay").keys() == SERVICES
    first, again = rollouts_of(recorded.out), rollouts_of(out)
    assert len(again) == ROLLOUTS + 4 * EVALUATIONS and first.keys() <= again.keys()
    assert [name for name in first if first[name] != again[name]] == []
    assert final_weights(out) == final_weights(recorded.out)


def test_a_question_outside_of_the_recording_ends_the_run_by_name(recorded: Recorded) -> None:
    """The cassette, the service and the request; nothing has gone out."""
    folder, out = recorded.folder, recorded.folder / "other"
    config = recorded.config("other", questions=write_questions(folder / "others.jsonl", "lakes"))
    output = end_of(command("train", str(config), "--out", str(out)))
    assert f"cassette {folder / FILES['tape']} holds no answer of service '" in output
    assert went_out(records(out), "(live|retries|failures|outages)") == {} and leftovers(out) == []
