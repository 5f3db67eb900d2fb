"""A task's questions from files: splits that never move, a stream that is a pure function, choices by tag and rate."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.benchmarks import QuestionFile, read_questions, write_questions
from mgrpo.benchmarks.check import check_questions
from mgrpo.benchmarks.question_file import split_of
from mgrpo.benchmarks.questions import digest_of
from mgrpo.environments.task import Question, Split
from mgrpo.errors import ConfigError
from tests.question_kit import SECRETS, write_jsonl, write_secret

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda t: bool(t.strip())
)


def row(number: int, **more: object) -> dict[str, object]:
    return {"id": f"q{number}", "question": f"question {number}?", "answer": str(number), **more}


def numbered(path: Path, n: int, **more: object) -> Path:
    return write_jsonl(path, [row(i, **more) for i in range(n)])


# -- splits and stream -----------------------------------------------------------------------------------------------


def test_every_question_is_in_one_split_and_stays_there(tmp_path: Path) -> None:
    """Whatever the order of the rows, and however many others there are."""
    rows = [row(i) for i in range(300)]
    whole = QuestionFile.of({"path": str(write_jsonl(tmp_path / "a.jsonl", rows))})
    splits = {q.id: s for s in get_args(Split) for q in whole.question_set(s)}
    assert len(splits) == 300
    sizes = Counter(splits.values())
    assert all(15 <= sizes[s] <= 45 for s in ("validation", "heldout")), sizes
    random.Random(1).shuffle(rows)
    fewer = QuestionFile.of({"path": str(write_jsonl(tmp_path / "b.jsonl", rows[:200]))})
    assert {q.id: s for s in get_args(Split) for q in fewer.question_set(s)} == {
        str(r["id"]): splits[str(r["id"])] for r in rows[:200]
    }


@given(st.text(max_size=12), st.floats(0, 0.5), st.floats(0, 0.49), st.floats(0, 0.49))
@settings(max_examples=80, deadline=None)
def test_a_fraction_moves_no_question_of_the_other(
    name: str, heldout: float, less: float, more: float
) -> None:
    """More validation questions are taken from training, never from what is held out."""
    low, high = sorted((less, more))
    before, after = split_of(name, low, heldout), split_of(name, high, heldout)
    assert (before == "heldout") == (after == "heldout")
    assert before == after or (before, after) == ("train", "validation")


def test_the_stream_is_endless_reshuffled_and_pure(tmp_path: Path) -> None:
    """Each epoch has every training question once, in another order each; any index can be asked at any time, of any
    object over the same questions in any order."""
    path = numbered(tmp_path / "q.jsonl", 40)
    source = QuestionFile.of({"path": str(path)})
    n = len(source)
    stream = [source.question(i, 7).id for i in range(6 * n)]
    epochs = [stream[i * n : (i + 1) * n] for i in range(6)]
    train = sorted(q.id for q in source.question_set("train"))
    assert all(sorted(epoch) == train for epoch in epochs) and len({tuple(e) for e in epochs}) == 6
    rows = [row(i) for i in range(40)]
    again = QuestionFile.of({"path": str(write_jsonl(tmp_path / "r.jsonl", rows[::-1]))})
    for index in random.Random(0).sample(range(6 * n), 60):
        assert again.question(index, 7).id == stream[index]
    assert [again.question(i, 8).id for i in range(n)] != epochs[0]
    with pytest.raises(ValueError, match="index -1: expected 0 or more"):
        source.question(-1, 7)


def test_questions_of_a_split_are_the_same_for_every_policy(tmp_path: Path) -> None:
    """The first n of a larger choice are the smaller one; there are no more than the split has, none of training."""
    source = QuestionFile.of({"path": str(numbered(tmp_path / "q.jsonl", 200))})
    few, many = source.questions("heldout", 5), source.questions("heldout", 5000)
    assert [q.id for q in many[:5]] == [q.id for q in few]
    assert {q.id for q in many} == {q.id for q in source.question_set("heldout")}
    assert [q.id for q in source.questions("heldout", 5, seed=1)] != [q.id for q in few]
    train = {source.question(i, 0).id for i in range(len(source))}
    assert not train & {q.id for s in ("validation", "heldout") for q in source.question_set(s)}  # type: ignore[arg-type]


def test_a_split_with_a_file_of_its_own(tmp_path: Path) -> None:
    """Nothing of the first file is set aside for it."""
    main, own = numbered(tmp_path / "main.jsonl", 50), write_secret(tmp_path / "x.csv")
    source = QuestionFile.of(
        {
            "path": str(main),
            "validation": {"path": str(main), "where": {}, "limit": 3},
            "heldout": {"source": "xbench", "path": str(own)},
        }
    )
    assert len(source) == 50 and len(source.question_set("validation")) == 3
    assert [(q.text, q.secret) for q in source.question_set("heldout")] == [(t, True) for t, _ in SECRETS]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pth": "x"}, "questions: p"),
        ({"rates": "r.jsonl"}, "rates='r.jsonl' has no effect without pass_rate"),
        ({"fractions": {"heldout": 0.5, "validation": 0.5}}, "leave nothing to train on"),
        ({"fractions": {"heldout": 0.2}, "heldout": {"path": "x"}}, "fractions.heldout has no effect"),
        ({"pass_rate": [0.5]}, "pass_rate"),
        ({"pass_rate": [0.9, 0.1]}, "expected 0 <= low <= high <= 1"),
        ({"pass_rate": [0.0, 0.5]}, "has no pass rates; mgrpo filter measures them"),
        ({"where": {"level": ["3"]}}, "no question with level = 3; no question has the tag level"),
        ({"where": {"hops": ["4"]}}, "no question with hops = 4; hops is 2"),
        ({"source": "gaja"}, "source 'gaja' is unknown"),
    ],
)
def test_a_mistake_in_the_options_is_named(options: dict[str, object], words: str, tmp_path: Path) -> None:
    path = numbered(tmp_path / "q.jsonl", 20, tags={"hops": "2"})
    with pytest.raises(ConfigError, match=words):
        QuestionFile.of({"path": str(path)} | options)


def test_an_empty_split_is_refused_when_it_is_asked(tmp_path: Path) -> None:
    path = numbered(tmp_path / "q.jsonl", 4)
    source = QuestionFile.of({"path": str(path), "fractions": {"validation": 0.0, "heldout": 0.0}})
    with pytest.raises(
        ConfigError, match=r"no question is in split 'heldout'; set fractions\.heldout higher"
    ):
        source.questions("heldout", 2)


# -- choosing and writing --------------------------------------------------------------------------------------------


def test_where_and_pass_rates_choose(tmp_path: Path) -> None:
    """Several tags must all fit; bounds include their ends; a question without a rate is left out."""
    rows = [
        row(0, tags={"level": "1", "lang": "en"}, pass_rate=0.0),
        row(1, tags={"level": 2, "lang": "en"}, pass_rate=0.5),
        row(2, tags={"level": "2", "lang": "zh"}, pass_rate=1),
        row(3, tags={"level": "3"}),
    ]
    path = write_jsonl(tmp_path / "q.jsonl", rows)

    def ids(**options: object) -> list[str]:
        return [q.id for q in read_questions("jsonl", path, **options)]  # type: ignore[arg-type]

    assert ids() == ["q0", "q1", "q2", "q3"]
    assert ids(where={"level": ["1", "2"]}) == ["q0", "q1", "q2"]
    assert ids(where={"level": ["1", "2"], "lang": ["en"]}) == ["q0", "q1"]
    assert ids(pass_rate=(0.0, 0.5)) == ["q0", "q1"] and ids(pass_rate=(0.5, 1.0)) == ["q1", "q2"]
    with pytest.raises(
        ConfigError, match=r"no question has a pass rate of 0\.6 to 0\.9; they go from 0 to 1"
    ):
        ids(pass_rate=(0.6, 0.9))
    rates = write_jsonl(
        tmp_path / "rates.jsonl", [{"id": "q3", "pass_rate": 0.25}, {"id": "q0", "played": 0}]
    )
    assert ids(pass_rate=(0.0, 0.3), rates=rates) == ["q0", "q3"]
    with pytest.raises(ConfigError, match=r"q\.jsonl: lmit: unknown key"):
        ids(lmit=2)
    assert len(ids(limit=2)) == 2 and set(ids(limit=2)) < set(ids(limit=3))


@given(
    st.lists(
        st.tuples(
            TEXT, st.lists(TEXT, min_size=1, max_size=3, unique=True), st.dictionaries(TEXT, TEXT, max_size=2)
        ),
        min_size=1,
        max_size=4,
    ),
    st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(rows: list[tuple[str, list[str], dict[str, str]]], rate: float) -> None:
    """Text, answers, tags, pass rate and info of any question come back."""
    import tempfile

    questions = [
        Question(
            text, answers[0], {"pass_rate": rate, "path": [1, "x"]}, id=str(i),
            answers=tuple(answers) if len(answers) > 1 else (), tags=tags,
        )
        for i, (text, answers, tags) in enumerate(rows)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "q.jsonl"
        write_questions(path, questions)
        assert read_questions("jsonl", path) == questions


def test_secret_questions_are_not_written(tmp_path: Path) -> None:
    """Nor is a file left that holds some of them."""
    secret = read_questions("xbench", write_secret(tmp_path / "x.csv"))
    out = tmp_path / "out.jsonl"
    with pytest.raises(ConfigError, match="question '0' is of a set that must not be published"):
        write_questions(out, [Question("plain", "a", id="p"), *secret])
    assert not out.exists()


def test_a_digest_names_a_set_whatever_its_order() -> None:
    one, two = Question("a", "b", id="1"), Question("c", "d", id="2", answers=("d", "e"))
    assert digest_of([one, two]) == digest_of([two, one]) != digest_of([one])
    assert digest_of([one]) != digest_of([Question("a", "B", id="1")])


# -- check -----------------------------------------------------------------------------------------------------------


def test_a_check_finds_what_is_wrong_and_quotes_nothing(tmp_path: Path) -> None:
    """Every bad row, not the first alone; answers in the question as words of their own, yes and no aside."""
    rows: list[dict[str, object]] = [
        row(0, tags={"hops": "2"}, pass_rate=0.5),
        row(0),
        {"id": "e1", "question": "", "answer": "a"},
        {"id": "e2", "question": "q"},
        {"id": "s1", "question": "Is the capital of Fiji SUVA?", "answer": "Suva"},
        {"id": "s2", "question": "Is Suvarov an island?", "answer": "Suva"},
        {"id": "s3", "question": "Is it yes or no?", "answer": "no"},
        {"id": "d1", "question": "The same  words.", "answer": "a"},
        {"id": "d2", "question": "the same words", "answer": "b"},
        {"id": "t1", "question": "Twice?", "answers": ["Ann B.", "ann b"]},
        {"id": "f1", "question": "In which file?", "answer": "x", "attachments": ["none.pdf"]},
    ]
    check = check_questions("jsonl", write_jsonl(tmp_path / "q.jsonl", rows))
    assert len(check.questions) == 9
    assert [error.partition("q.jsonl: ")[2] for error in check.errors] == [
        "line 3, column 'question': empty, expected text",
        "line 4, column 'answer': expected either answer or answers",
        "id 'q0' stands 2 times",
    ]
    assert check.warnings == {
        "the same text as another": ["q0", "q0", "d1", "d2"],
        "an answer in the question": ["s1"],
        "the same answer twice": ["t1"],
        "a file that is not there": ["f1"],
    }
    assert check.tags() == {"hops": {"2": 1, "": 8}} and check.rated() == 1
    assert check.lengths()["answer"] == (1, 1.0, 6)
