"""mgrpo bench, filter and questions: figures by hand, resumed bit for bit, nothing secret on a disk."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from mgrpo.benchmarks import QuestionFile, read_questions
from mgrpo.cli import repeats
from mgrpo.cli.bench import bench
from mgrpo.cli.filter import filter_questions
from mgrpo.cli.questions import check, make
from mgrpo.config import dump_config, load_config
from mgrpo.environments.task import Split
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.model.policy import save_policy
from mgrpo.record.reader import Recording
from mgrpo.record.redaction import WITHHELD
from tests.bench_task import KEY_ENV, AskTask
from tests.models import tiny_policy
from tests.question_kit import SECRETS, files_with, write_jsonl, write_secret
from tests.runs import ROOT
from tests.worker_kit import Worker

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = "sk-0123-of-a-service"
OPEN = [
    {"id": f"q{i}", "question": f"w{i + 1} w{2 * i + 3}", "answer": f"w{i}", "tags": {"hops": str(2 + i % 2)}}
    for i in range(6)
]


def overrides(questions: Path, heldout: Path | None = None, **options: object) -> list[str]:
    found: dict[str, object] = {"questions.path": str(questions), **options}
    if heldout is not None:
        for split in ("heldout", "validation"):
            found |= {f"questions.{split}.source": "xbench", f"questions.{split}.path": str(heldout)}
    return [
        "task.name=tests.bench_task:AskTask",
        *(f"task.options.{n}={json.dumps(v)}" for n, v in found.items()),
    ]


def run_folder(folder: Path, *sets: str) -> Path:
    """What a finished run of one agent leaves, without the run."""
    config = load_config(ROOT / "tests" / "alone.toml", [*sets, "rollout.slots=4"])
    folder.mkdir()
    dump_config(config, folder / "config.json")
    for kept, seed in (("start", 1), ("final", 2)):
        (folder / "agents" / "main").mkdir(parents=True, exist_ok=True)
        save_policy(tiny_policy("shift", seed), folder / "agents" / "main" / kept)
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "open.jsonl", OPEN)


def report(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / f"bench-{name}.json").read_text())
    return found


def made(monkeypatch: pytest.MonkeyPatch) -> list[AskTask]:
    """The tasks that a command makes."""
    tasks: list[AskTask] = []
    before = AskTask.__init__

    def init(self: AskTask, *arguments: Any) -> None:
        before(self, *arguments)
        tasks.append(self)

    monkeypatch.setattr(AskTask, "__init__", init)
    return tasks


# -- bench -----------------------------------------------------------------------------------------------------------


def test_a_bench_reports_what_was_played(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its figures follow from the scores of its own rows; answers are kept; services are asked once and closed."""
    tasks = made(monkeypatch)
    run = run_folder(tmp_path / "run", *overrides(questions, lost=["q5"]))
    bench(run, [f"open=jsonl:{questions}"], repeats=3)
    found = report(run, "open")
    rows = {row["id"]: row for row in found["per_question"]}
    means = [sum(row["scores"]) / 3 for name, row in rows.items() if name != "q5"]
    assert found["avg"] == pytest.approx(sum(means) / 5) and 0 < found["avg"] < 1
    variance = sum((x - found["avg"]) ** 2 for x in means) / 4
    assert found["stderr"] == pytest.approx(math.sqrt(variance / 5))
    passed = [any(row["scores"]) for name, row in rows.items() if name != "q5"]
    assert found["pass"]["3"] == {"value": pytest.approx(sum(passed) / 5), "n_questions": 5}
    assert (found["n_questions"], found["n_scored"], found["failed"]) == (6, 5, {"infrastructure": 3})
    assert rows["q5"]["scores"] == [None] * 3 and rows["q5"]["answers"] == [None] * 3
    assert rows["q1"]["question"] == "w2 w5" and all(str(a).endswith("w1") for a in rows["q1"]["answers"])
    assert {t: v["n_questions"] for t, v in found["tags"]["hops"].items()} == {"2": 3, "3": 3}
    assert found["digests"] == {"scorer": "rule-even", "corpus": "c0ffee"} and found["scored_by"] == ["5c0re"]
    assert found["block_list_hits"] == 2 * 15 and found["tool_calls"] == {"ok": 15}
    assert (tasks[0].events[0], tasks[0].events[-1]) == ("preflight", "close")
    assert tasks[0].events.count("preflight") == 1
    shown = capsys.readouterr().out
    assert f"{found['avg']:.3f}" in shown and "3 infrastructure" in shown and "started again" in shown


def test_an_interrupted_bench_goes_on_with_the_same_numbers(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after 5 of 18 rollouts, in the middle of a line: started again it plays the rest, and reports what an
    uninterrupted one does. With other settings it is refused, and once whole its journal is gone."""
    whole, cut = (run_folder(tmp_path / name, *overrides(questions)) for name in ("whole", "cut"))
    bench(whole, [f"open=jsonl:{questions}"])
    tasks = made(monkeypatch)
    bench(cut, [f"open=jsonl:{questions}"], limit=1)
    add = repeats.Journal.add

    def interrupted(self: repeats.Journal, line: repeats.Line) -> None:
        if len(self.lines) == 5:
            self._file.write('{"id": "q')
            raise KeyboardInterrupt
        add(self, line)

    monkeypatch.setattr(repeats.Journal, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(cut, [f"open=jsonl:{questions}"])
    monkeypatch.setattr(repeats.Journal, "add", add)
    with pytest.raises(ConfigError, match=r"begun with other settings \(seed 0 -> 1\)"):
        bench(cut, [f"open=jsonl:{questions}"], seed=1)
    bench(cut, [f"open=jsonl:{questions}"])
    assert len([e for e in tasks[-1].events if "/" in e]) == 18 - 5
    ignored = {"folder", "policies", "seconds"}
    one, two = ({k: v for k, v in report(run, "open").items() if k not in ignored} for run in (whole, cut))
    assert one == two
    assert not list(cut.glob(".bench-*"))


def test_noise_follows_from_the_question_alone(questions: Path, tmp_path: Path) -> None:
    """In a set of fewer questions each gets the same rollouts; with another seed, or before RL, others; greedy repeats
    are refused."""
    run = run_folder(tmp_path / "run", *overrides(questions))
    bench(run, [f"all=jsonl:{questions}", f"odd=jsonl:{questions}"], repeats=2)
    bench(run, [f"odd=jsonl:{questions}"], repeats=2, where=["hops=3"])
    rows = {row["id"]: row for row in report(run, "all")["per_question"]}
    odd = report(run, "odd")["per_question"]
    assert [row["id"] for row in odd] == ["q1", "q3", "q5"] and all(rows[row["id"]] == row for row in odd)
    bench(run, [f"all=jsonl:{questions}"], repeats=2, seed=1)
    assert {row["id"]: row for row in report(run, "all")["per_question"]} != rows
    bench(run, [f"all=jsonl:{questions}"], repeats=1, before=True)
    assert report(run, "all-before")["policies"] == {"main": str(run / "agents" / "main" / "start")}
    bench(run, ["own=task:train"], greedy=True)
    assert report(run, "own-greedy")["repeats"] == 1
    with pytest.raises(ConfigError, match="every repeat would be the same"):
        bench(run, ["own=task:train"], greedy=True, repeats=2)


def test_an_outage_ends_a_bench(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing answers, it does not play on for hours; what it has is kept."""
    run = run_folder(tmp_path / "run", *overrides(questions, every=1))
    with pytest.raises(
        InfrastructureError, match="all 18 rollouts of the set failed, the last with: no answer for w"
    ):
        bench(run, [f"open=jsonl:{questions}"])
    monkeypatch.setattr(repeats, "MAX_FAILED", 4)
    with pytest.raises(
        InfrastructureError, match=r"4 rollouts in a row failed, .*started again, the command goes on"
    ):
        bench(run, [f"open=jsonl:{questions}"])
    assert (run / ".bench-open.journal.jsonl").exists() and not (run / "bench-open.json").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"sets": ["jsonl:x"]}, "expected NAME=SOURCE:PATH"),
        ({"sets": ["../a=jsonl:x"]}, "expected NAME=SOURCE:PATH"),
        ({"sets": ["a=gala:x.jsonl"]}, "expected SOURCE:PATH with a source of jsonl, gaia"),
        ({"sets": ["a=jsonl:none.jsonl"]}, r"none\.jsonl: no such file"),
        ({"sets": ["a=task:tests"]}, "split 'tests': expected one of train, validation, heldout"),
        ({"sets": ["a=task:train", "a=task:train"]}, "'a' names two sets"),
        ({"repeats": 0}, "--repeats 0"),
        ({"where": ["hops"]}, "--where 'hops': expected TAG=VALUE"),
    ],
)
def test_a_mistake_is_named(more: dict[str, Any], words: str, questions: Path, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", *overrides(questions))
    with pytest.raises(ConfigError, match=words):
        bench(run, **({"sets": [f"a=jsonl:{questions}"]} | more))
    assert not list(run.glob("*bench-*"))


def test_a_run_that_has_not_ended_is_named(questions: Path, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", *overrides(questions))
    shutil.rmtree(run / "agents" / "main" / "final")
    with pytest.raises(ConfigError, match="not trained to the end yet; --before"):
        bench(run, ["a=task:train"])
    with pytest.raises(ConfigError, match="not a run's folder"):
        bench(tmp_path / "nowhere", ["a=task:train"])


# -- filter and questions --------------------------------------------------------------------------------------------


def test_a_filter_measures_pass_rates(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rates are of the rollouts that were played: every second one is lost, and one question altogether. Its file is a
    question file again, from which the hard ones are chosen."""
    run = run_folder(tmp_path / "run", *overrides(questions, every=2, lost=["q4"]))
    out = tmp_path / "rated.jsonl"
    filter_questions(run, str(questions), out, n=4)
    rated = {q.id: q for q in read_questions("jsonl", out)}
    assert [q.text for q in rated.values()] == [row["question"] for row in OPEN]
    assert all(q.tags == row["tags"] for q, row in zip(rated.values(), OPEN, strict=True))
    assert rated["q4"].info == {"rollouts": {"played": 0, "failed": 4}}
    rates = {name: q.info["pass_rate"] for name, q in rated.items() if name != "q4"}
    assert all(rated[name].info["rollouts"] == {"played": 2, "failed": 2} for name in rates)
    assert set(rates.values()) <= {0.0, 0.5, 1.0} and len(set(rates.values())) > 1
    assert {q.id for q in read_questions("jsonl", out, pass_rate=(0.0, 0.5))} == {
        n for n, r in rates.items() if r <= 0.5
    }
    assert "failed rollouts, in no rate: 14 infrastructure" in capsys.readouterr().out
    filter_questions(run, str(questions), out, n=4)  # some had failed: the same command tries them again
    assert {q.id: q for q in read_questions("jsonl", out)} == rated


def test_a_filter_needs_no_run(questions: Path, tmp_path: Path) -> None:
    """A TOML file that names its models does, e.g. for the untrained team; one that names none is refused. What is
    there is not overwritten; a closed book is the task without tools."""
    run = run_folder(tmp_path / "run", *overrides(questions))
    out = tmp_path / "rated.jsonl"
    config = tmp_path / "run.toml"
    text = (
        (ROOT / "tests" / "alone.toml")
        .read_text()
        .replace("tests.relay:RelayTask", "tests.bench_task:AskTask")
    )
    text = text.replace(
        "[agents.main]", f'[task.options]\nquestions = {{ path = "{questions}" }}\n[agents.main]'
    )
    config.write_text(text)
    with pytest.raises(ConfigError, match=r"agents\.main\.model is unset; give the folder of a run"):
        filter_questions(config, str(questions), out, n=1)
    config.write_text(
        text.replace("[agents.main]", f'[agents.main]\nmodel = "{run / "agents" / "main" / "start"}"')
    )
    filter_questions(config, str(questions), out, n=2, closed_book=True)
    assert {q.info["pass_rate"] for q in read_questions("jsonl", out)} == {0.0}
    with pytest.raises(ConfigError, match="is there already; delete it"):
        filter_questions(config, str(questions), out, n=2)
    other = run_folder(tmp_path / "other", "task.name=atlas")
    with pytest.raises(ConfigError, match=r"--closed-book sets task\.options\.tools = \{\}: task 'atlas'"):
        filter_questions(other, str(questions), tmp_path / "b.jsonl", n=1, closed_book=True)


def test_questions_are_made_and_checked(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a task offers becomes a file that checks; a bad file ends with status 1 and shows no text."""
    run, out = run_folder(tmp_path / "run", *overrides(questions)), tmp_path / "made.jsonl"
    make(run / "config.json", out, split="train")
    assert {q.text for q in read_questions("jsonl", out)} <= {row["question"] for row in OPEN}
    check(str(out))
    assert "tag hops: 2 " in capsys.readouterr().out
    relay = run_folder(tmp_path / "relay")
    with pytest.raises(ConfigError, match=r"has no question_set\(\)"):
        make(relay / "config.json", tmp_path / "b.jsonl")
    make(relay / "config.json", tmp_path / "b.jsonl", n=6)
    assert len(read_questions("jsonl", tmp_path / "b.jsonl")) == 6
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"question": "whisper", "answer": ""}, OPEN[0]])
    capsys.readouterr()
    with pytest.raises(typer.Exit) as end:
        check(str(bad))
    shown = capsys.readouterr().out
    assert end.value.exit_code == 1 and "column 'answer': empty" in shown and "whisper" not in shown


# -- redaction -------------------------------------------------------------------------------------------------------


WORDS = [text for pair in SECRETS for text in pair]


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(KEY_ENV, KEY)
    yield KEY


def test_a_bench_of_a_secret_set_writes_ids_and_scores(questions: Path, tmp_path: Path, key: str) -> None:
    """Reports and rates hold no question, no answer and no token of one, and journals neither: they stay, since some
    rollouts failed with words that quote it all."""
    secret = write_secret(tmp_path / "x.csv")
    run = run_folder(tmp_path / "run", *overrides(questions, secret, every=3))
    bench(run, [f"x=xbench:{secret}", "own=task:heldout"], repeats=6)
    filter_questions(run, f"xbench:{secret}", run / "rates.jsonl", n=3)
    assert len(list(run.glob(".*.journal.jsonl"))) == 3
    assert files_with(run, *WORDS, key, "w17", "w90") == {
        "agents/main/start/tokenizer.json",
        "agents/main/final/tokenizer.json",
    }
    for name in ("x", "own"):
        found = report(run, name)
        assert found["redacted"] and found["failed"] == {"infrastructure": 6} and found["n_scored"] == 3
        assert all(row.keys() == {"id", "tags", "scores", "failed"} for row in found["per_question"])
    rows = [json.loads(line) for line in (run / "rates.jsonl").read_text().splitlines()]
    assert [row.keys() == {"id", "played", "failed", "pass_rate"} for row in rows] == [True] * 3
    rated = QuestionFile.of(
        {"source": "xbench", "path": str(secret), "pass_rate": [0.0, 1.0], "rates": str(run / "rates.jsonl")}
    )
    assert sum(len(rated.question_set(s)) for s in get_args(Split)) == 3
    with pytest.raises(ConfigError, match=r"--no-redact: xbench:.* must not be published"):
        bench(run, [f"x=xbench:{secret}"], redact=False)


def test_an_open_set_can_be_redacted(questions: Path, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", *overrides(questions))
    bench(run, [f"o=jsonl:{questions}"], repeats=1, redact=True)
    assert all(row.keys() == {"id", "tags", "scores"} for row in report(run, "o")["per_question"])
    assert not files_with(run, str(OPEN[1]["question"]))


def test_training_on_a_secret_set_leaves_no_word_in_record_and_store(tmp_path: Path, key: str) -> None:
    """Groups of it are opened without their question; failures travel without their words, which quote it; of the rest
    ids, scores, lengths and the states of tool calls are kept."""
    secret = write_secret(tmp_path / "x.csv")
    options = {
        "questions": {
            "source": "xbench",
            "path": str(secret),
            "fractions": {"validation": 0.0, "heldout": 0.0},
        }
    }
    task = AskTask(options | {"every": 2, "stop": "."}, ("main",))
    worker = Worker(tmp_path / "run" / "rollouts" / "0", task, "trainer.questions=3", "trainer.minibatches=1")
    try:
        worker.open("open", "open", "open")
        worker.play()
        worker.context.shipper.drain()
        assert [meta["question"] for meta in worker.store.metas[:3]] == [""] * 3
        assert len(worker.store.reasons) == 3
        for reason in worker.store.reasons:
            assert reason.startswith("InfrastructureError (") and "bench_task.py:" in reason
            assert not any(text in reason for text in (*WORDS, key))
    finally:
        worker.close()
    assert files_with(tmp_path / "run", *WORDS, key) == set()
    kept = list(Recording([tmp_path / "run"]).rollouts.values())
    assert [r.head.status for r in kept].count("ok") == [r.head.status for r in kept].count("failed") == 3
    for rollout in kept:
        head, body = rollout.head, rollout.body()
        assert head.redacted and (head.question, head.gold, head.answer) == ("", "", "")
        if head.status == "failed":
            assert body.failure == WITHHELD
            continue
        (trajectory,) = body.trajectories
        assert head.tokens == {"main": trajectory.n} and trajectory.scores == {"format": 1.0}
        assert not (trajectory.tokens or trajectory.loss_mask or trajectory.logprobs or trajectory.versions)
        assert body.info.pop("question_id") in {"0", "1", "2"} and body.info.pop("opened_at") == {}
        assert body.info == {
            "tools": [{"role": "main", "invocation": 0, "turn": 0, "status": "ok", "seconds": 0.5, "chars": 9}],
            "verdict": {"rule": "exact", "rule_score": head.correct, "source": "live"},
        }  # fmt: skip
