"""Readers of published question sets, their ciphers, and the figures of repeated rollouts."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.benchmarks import read_questions
from mgrpo.benchmarks.cipher import decrypt, encrypt
from mgrpo.benchmarks.statistics import QuestionScores, by_tag, pass_at_k, score_set, standard_error
from mgrpo.errors import ConfigError
from tests.question_kit import CANARY, SECRETS, write_csv, write_jsonl, write_secret

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


# -- ciphers ---------------------------------------------------------------------------------------------------------


@given(TEXT, TEXT.filter(bool), st.sampled_from(["xbench", "browsecomp"]))
@settings(max_examples=150, deadline=None)
def test_a_cipher_gives_back_what_it_was_given(text: str, canary: str, cipher: str) -> None:
    """Any text under any canary, in letters of any script."""
    assert decrypt(cipher, encrypt(cipher, text, canary), canary) == text  # type: ignore[arg-type]


def test_the_ciphers_are_the_published_ones() -> None:
    """Against the published code's own steps, byte by byte: xbench's key is the canary, BrowseComp's its SHA-256."""
    text, canary = "Wer schrieb „Faust“? " * 5, "the canary"

    def twin(key: bytes) -> str:
        data = text.encode()
        return base64.b64encode(bytes(b ^ key[i % len(key)] for i, b in enumerate(data))).decode()

    assert encrypt("xbench", text, canary) == twin(canary.encode())
    assert encrypt("browsecomp", text, canary) == twin(hashlib.sha256(canary.encode()).digest())


@pytest.mark.parametrize(
    ("text", "canary", "words"),
    [("§§", "c", "no base64"), ("/////w==", "a", "does not decrypt"), ("aGk=", "", "empty")],
)
def test_what_does_not_decrypt_is_refused(text: str, canary: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decrypt("xbench", text, canary)


# -- readers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cipher", ["xbench", "browsecomp"])
def test_encrypted_sets_are_read_as_secret(cipher: str, tmp_path: Path) -> None:
    """With the byte order mark that the published files have; ids are the file's, or a hash of the encrypted text."""
    path = write_secret(tmp_path / "set.csv", cipher)  # type: ignore[arg-type]
    questions = read_questions(cipher, path)
    assert [(q.text, q.answer) for q in questions] == list(SECRETS)
    assert all(q.secret for q in questions) and len({q.id for q in questions}) == 3
    if cipher == "xbench":
        assert [q.id for q in questions] == ["0", "1", "2"]
    else:
        assert questions[0].tags == {"topic": "Art"}
        assert [q.id for q in read_questions(cipher, path)] == [q.id for q in questions]


def test_an_encrypted_row_that_is_damaged_is_named_and_not_quoted(tmp_path: Path) -> None:
    """Another row's canary: file, line and column, and nothing of what came out."""
    good = encrypt("xbench", "what is it, über alles?" * 3, CANARY)
    rows = [
        {"id": "1", "prompt": good, "answer": encrypt("xbench", "x", CANARY), "canary": CANARY},
        {"id": "2", "prompt": good, "answer": good, "canary": "\u00e9\u00ff wrong"},
    ]
    path = write_csv(tmp_path / "x.csv", rows)
    with pytest.raises(
        ConfigError, match=rf"{path}: line 3, column 'prompt': does not decrypt to text"
    ) as error:
        read_questions("xbench", path)
    assert "alles" not in str(error.value)


GAIA = [
    {
        "task_id": "a-1", "Question": "How many?", "Level": "1", "Final answer": "17", "file_name": "",
        "file_path": "", "Annotator Metadata": {"Steps": "1. look"},
    },
    {
        "task_id": "b-2", "Question": "Which table?", "Level": 2, "Final answer": "a, b", "file_name": "t.xlsx",
        "file_path": "2023/validation/t.xlsx", "Annotator Metadata": {"Steps": "open it"},
    },
]  # fmt: skip


def test_gaia_is_read_from_parquet_and_jsonl_alike(tmp_path: Path) -> None:
    """Level is a tag whether it is text or a number; attachments lie beside the metadata or where file_path says."""
    import pyarrow as pa
    from pyarrow import parquet

    folder = tmp_path / "2023" / "validation"
    folder.mkdir(parents=True)
    (folder / "t.xlsx").write_bytes(b"x")
    rows = [row | {"Level": str(row["Level"])} for row in GAIA]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    (tmp_path / "copy").mkdir()
    lists = [
        read_questions("gaia", folder / "metadata.parquet"),
        read_questions("gaia", write_jsonl(folder / "metadata.jsonl", GAIA)),
        read_questions("gaia", write_jsonl(tmp_path / "metadata.jsonl", GAIA)),
    ]
    for questions in lists:
        assert [(q.id, q.text, q.answer) for q in questions] == [
            ("a-1", "How many?", "17"),
            ("b-2", "Which table?", "a, b"),
        ]
        assert [dict(q.tags) for q in questions] == [
            {"level": "1", "files": "0"},
            {"level": "2", "files": "1"},
        ]
        assert Path(questions[1].attachments[0]).resolve() == (folder / "t.xlsx").resolve()
        assert all(q.secret for q in questions)


def test_gaia_without_its_files_is_refused_unless_they_are_not_needed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "metadata.jsonl", GAIA)
    with pytest.raises(ConfigError, match=r"'b-2' needs the file .*t\.xlsx, which is not there"):
        read_questions("gaia", path)
    assert [q.id for q in read_questions("gaia", path, where={"files": ["0"]})] == ["a-1"]
    assert len(read_questions("gaia", path, attachments=False)) == 2
    hostile = write_jsonl(
        tmp_path / "h.jsonl", [GAIA[1] | {"file_name": "../../x", "file_path": "/../../etc/passwd"}]
    )
    assert read_questions("gaia", hostile, attachments=False)[0].attachments == (str(tmp_path / "x"),)


def test_gaias_hidden_answers_are_refused(tmp_path: Path) -> None:
    """The test split's answers are "?": a score against them would say nothing."""
    path = write_jsonl(tmp_path / "metadata.jsonl", [GAIA[0] | {"Final answer": "?"}])
    with pytest.raises(ConfigError, match="answers of this split are not public"):
        read_questions("gaia", path)


@pytest.mark.parametrize(
    "row",
    [
        {"Question": "Q?", "Answer": "A", "Root_Url": "http://r", "Info": {"Hop": "multi-source", "Domain": "education",
         "Difficulty_Level": "hard", "Language": "en", "Golden_Path": ["root->x"]}},
        {"question": "Q?", "answer": "A", "root_url": "http://r", "info": {"type": "multi-source",
         "domain": "education", "difficulty_level": "hard", "lang": "en", "golden_path": ["root->x"]}},
        {"question": "Q?", "answer": "A", "RootUrl": "http://r", "info": {"domain": "education", "Level": "hard",
         "lang": "en", "type": "multi-source", "golden_path": ["root->x"]}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_webwalker_in_its_three_spellings(row: dict[str, object], ending: str, tmp_path: Path) -> None:
    """The same question with the same id, tags and root, whichever copy it is from."""
    path = tmp_path / f"web.{ending}"
    path.write_text(json.dumps([row] if ending == "json" else row))
    (question,) = read_questions("webwalker", path)
    name = hashlib.blake2b(b"Q?\0http://r", digest_size=8).hexdigest()
    assert (question.text, question.answer, question.id) == ("Q?", "A", name)
    assert question.tags == {"type": "multi-source", "level": "hard", "domain": "education", "lang": "en"}
    assert question.info == {"root_url": "http://r", "golden_path": ["root->x"]} and not question.secret


def test_flashrag_simpleqa_and_frames(tmp_path: Path) -> None:
    """Several gold answers, tags of the metadata, a dict in a csv column, tabs and numbered link columns."""
    path = write_jsonl(
        tmp_path / "dev.jsonl",
        [
            {"id": "dev_0", "question": "who?", "golden_answers": ["Ann", "Ann B."],
             "metadata": {"type": "bridge", "level": "hard"}},
            {"id": "3hop1__7", "question": "where?", "golden_answers": ["Rome"], "metadata": {"facts": [1]}},
        ],
    )  # fmt: skip
    first, second = read_questions("flashrag", path)
    assert first.gold == ("Ann", "Ann B.") and first.tags == {"type": "bridge", "level": "hard"}
    assert second.gold == ("Rome",) and second.answers == () and second.tags == {"hops": "3"}
    path = write_csv(
        tmp_path / "simple.csv",
        [{"metadata": "{'topic': 'Art', 'answer_type': 'Date', 'urls': ['http://a']}",
          "problem": "when,\n\"so\"?", "answer": "1901"}],
    )  # fmt: skip
    (question,) = read_questions("simpleqa", path)
    assert question.text == 'when,\n"so"?' and question.tags == {"topic": "Art", "answer_type": "Date"}
    assert question.info == {"urls": ["http://a"]} and len(question.id) == 16
    path = write_csv(
        tmp_path / "frames.tsv",
        [{"": "4", "Prompt": "If, then?", "Answer": "Jane", "wikipedia_link_1": "http://1", "wikipedia_link_2": "",
          "reasoning_types": "Numerical reasoning | Tabular reasoning"}],
    )  # fmt: skip
    (question,) = read_questions("frames", path)
    assert (question.id, question.text, question.answer) == ("4", "If, then?", "Jane")
    assert question.info == {"urls": ["http://1"]} and list(question.tags) == ["reasoning"]


@pytest.mark.parametrize(
    ("source", "name", "content", "words"),
    [
        ("jsonl", "q.jsonl", '{"question": "q", "answer": "a"}\n{"question": "q"', r"q.jsonl: line 2: not valid JSON"),
        ("jsonl", "q.jsonl", '{"question": "q"}', r"line 1, column 'answer': expected either answer or answers"),
        ("jsonl", "q.jsonl", '{"question": "q", "answer": "a", "answers": ["a"]}', "either answer or answers"),
        ("jsonl", "q.jsonl", '{"question": "  ", "answer": "a"}', r"line 1, column 'question': empty"),
        ("jsonl", "q.jsonl", '{"question": "q", "answers": ["a", 1.5]}', r"column 'answers\[1\]': of type float"),
        ("jsonl", "q.jsonl", '{"question": "q", "answers": []}', "column 'answers': empty"),
        ("jsonl", "q.jsonl", '{"question": "q", "answer": "a", "lvl": 1}', r"column 'lvl': unknown"),
        ("jsonl", "q.jsonl", '{"question": "q", "answer": "\\ud800"}', "column 'answer': character 0 is half"),
        ("jsonl", "q.jsonl", '{"question": "q", "answer": "a", "pass_rate": 1.5}', "column 'pass_rate': 1.5"),
        ("jsonl", "q.jsonl", '{"question": "q", "answer": "a", "tags": {"x": [1]}}', "column 'tags.x': of type list"),
        ("jsonl", "q.jsonl", '{"id": "1", "question": "q", "answer": "a"}\n' * 2, "id '1' stands twice"),
        ("jsonl", "q.jsonl", "\n", "holds no question"),
        ("jsonl", "q.json", '{"question": "q"}', "expected a list of objects"),
        ("jsonl", "q.yaml", "", "expected a file that ends with .jsonl"),
        ("simpleqa", "s.csv", 'problem,answer\n"a,b\nc', "s.csv: line 3: unexpected end of data"),
        ("simpleqa", "s.csv", "problem,answer\na\n", "s.csv: line 2: 1 columns, the first line names 2"),
        ("simpleqa", "s.csv", "problem,answr\nq,a\n", r"line 2, column 'answer': missing; the file has problem, answr"),
        ("simpleqa", "s.csv", "metadata,problem,answer\nopen(1),q,a\n", "column 'metadata': expected the literal"),
        ("gaia", "m.parquet", "PAR1 not", "not a parquet file that can be read"),
        ("gala", "m.parquet", "", "source 'gala' is unknown, expected one of jsonl, gaia"),
    ],
)  # fmt: skip
def test_a_mistake_names_its_place(source: str, name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_questions(source, tmp_path / name)


def test_files_that_are_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; data sets are brought by their user"):
        read_questions("jsonl", tmp_path / "no.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"question": "über", "answer": "a"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        read_questions("jsonl", tmp_path / "latin.jsonl")


def test_lines_end_where_json_says(tmp_path: Path) -> None:
    """U+2028 and U+0085 are characters of a text, no ends of a line."""
    (tmp_path / "q.jsonl").write_text('{"question": "a\u2028b\u0085c", "answer": "a"}\n', encoding="utf-8")
    assert read_questions("jsonl", tmp_path / "q.jsonl")[0].text == "a\u2028b\u0085c"


# -- figures ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 7), st.data())
@settings(max_examples=60, deadline=None)
def test_pass_at_k_is_the_share_of_all_choices(n: int, data: st.DataObject) -> None:
    """Against counting every choice of k among n."""
    outcomes = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    k = data.draw(st.integers(1, n))
    choices = list(itertools.combinations(outcomes, k))
    assert pass_at_k(n, sum(outcomes), k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over all outcomes of n coins, weighed by their chance, is 1 - (1 - p)^k."""
    p, n = 0.3, 5
    for k in range(1, n + 1):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def scores(name: str, *outcomes: float | str, **tags: str) -> QuestionScores:
    """A text is the kind of a failure."""
    question = QuestionScores(name, tags)
    for repeat, outcome in enumerate(outcomes):
        (question.failed if isinstance(outcome, str) else question.scores)[repeat] = outcome  # type: ignore[assignment]
    return question


def test_the_figures_of_a_set_by_hand() -> None:
    """avg@3 is over questions, so a question with one rollout left weighs as much as one with three; failures are in no
    mean; pass@k is over the questions that have k."""
    questions = [
        scores("a", 1.0, 1.0, 0.0, level="1"),
        scores("b", 0.0, "infrastructure", "deadline", level="1"),
        scores("c", 1.0, 1.0, 1.0, level="2"),
        scores("d", "infrastructure", "infrastructure", "infrastructure", level="2"),
    ]
    found = score_set(questions, 3)
    assert (found.questions, found.scored, found.played) == (4, 3, 7)
    assert found.mean == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert found.stderr == pytest.approx(np.std([2 / 3, 0, 1], ddof=1) / math.sqrt(3))
    assert found.pass_at == {1: (pytest.approx(5 / 9), 3), 2: (1.0, 2), 3: (1.0, 2)}
    assert found.by_repeat == pytest.approx((2 / 3, 1.0, 0.5))
    assert found.failed == {"deadline": 1, "infrastructure": 4}
    tags = by_tag(questions, 3)["level"]
    assert tags["1"].mean == pytest.approx(1 / 3) and tags["2"].mean == 1.0 and math.isnan(tags["2"].stderr)
    assert sum(t.questions for t in tags.values()) == 4


def test_the_standard_error_covers_questions_and_repeats() -> None:
    """In sets drawn again and again, avg@n spreads around the true mean as the mean standard error says."""
    rng = np.random.default_rng(3)
    means, errors = [], []
    for _ in range(400):
        chances = rng.beta(0.5, 0.5, 40)
        drawn = rng.random((40, 3)) < chances[:, None]
        found = score_set([scores(str(i), *map(float, row)) for i, row in enumerate(drawn)], 3)
        means.append(found.mean)
        errors.append(found.stderr)
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.1)
    assert abs(np.mean(means) - 0.5) < 0.01
    assert math.isnan(standard_error([1.0]))
