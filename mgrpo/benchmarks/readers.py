"""Published question sets, row by row: which columns hold the question, its gold answers, and what results are
reported by.

    source      container        columns
    jsonl       own              id, question, answer | answers, tags, attachments, info, pass_rate
    gaia        parquet, jsonl   task_id, Question, Level, Final answer, file_name, file_path
    xbench      csv              id, prompt, answer, canary: XOR with the canary, base64
    browsecomp  csv              problem, answer, problem_topic, canary: XOR with SHA-256(canary), base64
    webwalker   jsonl, json      question, answer, root_url, info {type, difficulty_level | level, domain, lang, ...}
    flashrag    jsonl            id, question, golden_answers, metadata (nq, triviaqa, hotpotqa, 2wikimultihopqa,
                                 musique, bamboogle)
    simpleqa    csv              metadata, problem, answer
    frames      tsv              (index), Prompt, Answer, reasoning_types, wikipedia_link_*

A set without ids gets them from a hash of its text, or of its encrypted text, so that they are the same in every copy
and in any order. Questions of gaia, xbench and browsecomp are secret: see Question.secret.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from mgrpo.benchmarks.cipher import Cipher, decrypt
from mgrpo.benchmarks.rows import Row, encodable
from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError

Reader = Callable[[Row], Question]
OWN = frozenset({"id", "question", "answer", "answers", "tags", "attachments", "info", "passrate"})
HIDDEN = "?"  # GAIA's test split gives no answers


def content_id(*texts: str) -> str:
    """16 hexadecimal digits that name a question by its text."""
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def own(row: Row) -> Question:
    """A file of one's own. An unknown column is refused: it may be a misspelt one."""
    for name, folded in zip(row.names, row.columns, strict=False):
        if folded not in OWN:
            raise ConfigError(
                f"{row.place(name)}: unknown; expected one of {', '.join(sorted(OWN))}; put it into info"
            )
    text = row.text("question")
    if row.has("answer") == row.has("answers"):
        raise ConfigError(f"{row.place('answer')}: expected either answer or answers")
    answers = row.texts("answers") or ((row.text("answer"),) if row.has("answer") else ())
    if not answers:
        raise ConfigError(f"{row.place('answers')}: empty, expected at least one")
    info = dict(row.table("info"))
    if (rate := row.value("pass_rate")) is not None:
        info["pass_rate"] = pass_rate(rate, row.place("pass_rate"))
    return Question(
        text,
        answers[0],
        info,
        id=row.optional("id") or content_id(text, *answers),
        answers=answers if len(answers) > 1 else (),
        tags=tags_of(row),
        attachments=tuple(str(row.file.parent / name) for name in row.texts("attachments")),
    )


def pass_rate(value: object, place: str) -> float:
    """A pass rate in [0, 1]. Raises ConfigError naming the place for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{place}: {value!r:.40}, expected a number in [0, 1]")
    return float(value)


def tags_of(row: Row) -> dict[str, str]:
    """The column `tags`: an object of texts and whole numbers."""
    tags = {}
    for name, value in row.table("tags").items():
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ConfigError(f"{row.place(f'tags.{name}')}: of type {type(value).__name__}, expected text")
        tags[encodable(name, row.place("tags"))] = encodable(str(value), row.place(f"tags.{name}"))
    return tags


def gaia(row: Row) -> Question:
    """GAIA. Tag files: how many files the question needs, "0" or "1"; their folder is the metadata's, or what
    file_path names from the data set's root."""
    answer = row.text("Final answer")
    if answer.strip() == HIDDEN:
        raise ConfigError(
            f"{row.place('Final answer')}: {HIDDEN!r}: the answers of this split are not public, so nothing can be "
            "scored here; take the validation split"
        )
    name = row.optional("file_name")
    files = (str(_attachment(row.file, name, row.optional("file_path"))),) if name else ()
    return Question(
        row.text("Question"),
        answer,
        id=row.text("task_id"),
        tags={"level": row.text("Level"), "files": str(len(files))},
        attachments=files,
        secret=True,
    )


def _attachment(metadata: Path, name: str, path: str) -> Path:
    """Beside the metadata, or at the place that file_path names in one of the folders above. Names that lead out of
    them are taken by their last part alone."""
    parts = [p for p in Path(path).parts if p not in ("..", "/", "")]
    for root in [*metadata.absolute().parents][:4] if parts else []:
        if (found := root.joinpath(*parts)).is_file():
            return found
    return metadata.parent / Path(name).name


def xbench(row: Row) -> Question:
    """xbench-DeepSearch."""
    text, answer = _decrypted(row, "xbench", "prompt"), _decrypted(row, "xbench", "answer")
    return Question(text, answer, id=row.text("id"), secret=True)


def browsecomp(row: Row) -> Question:
    """BrowseComp. Its id is a hash of the encrypted text."""
    text, answer = _decrypted(row, "browsecomp", "problem"), _decrypted(row, "browsecomp", "answer")
    topic = row.optional("problem_topic")
    tags = {"topic": topic} if topic else {}
    name = row.optional("id") or content_id(row.text("problem"))
    return Question(text, answer, id=name, tags=tags, secret=True)


def _decrypted(row: Row, cipher: Cipher, column: str) -> str:
    text, canary = row.text(column), row.text("canary")
    try:
        plain = decrypt(cipher, text, canary)
    except ValueError as error:
        raise ConfigError(f"{row.place(column)}: {error}") from None
    if not plain.strip():
        raise ConfigError(f"{row.place(column)}: empty once decrypted")
    return plain


def webwalker(row: Row) -> Question:
    """WebWalkerQA, in each of the spellings of its copies. Tags: type, level, domain, lang."""
    details = row.inner("info")
    columns = {
        "type": ("type", "hop"),
        "level": ("difficulty_level", "level"),
        "domain": ("domain",),
        "lang": ("lang", "language"),
    }
    found = {tag: details.optional(*names) or row.optional(*names) for tag, names in columns.items()}
    text, root = row.text("question"), row.optional("root_url") or details.optional("root_url")
    info: dict[str, object] = {"root_url": root} if root else {}
    for name in ("golden_path", "source_website"):
        if (value := details.value(name)) is not None:
            info[name] = value
    return Question(
        text,
        row.text("answer"),
        info,
        id=row.optional("id") or content_id(text, root),
        tags={tag: value for tag, value in found.items() if value},
    )


def flashrag(row: Row) -> Question:
    """The sets in FlashRAG's form. Tags: type and level where the metadata has them, hops where the id tells them."""
    text, answers = row.text("question"), row.texts("golden_answers")
    if not answers:
        raise ConfigError(f"{row.place('golden_answers')}: empty, expected at least one")
    details = row.inner("metadata")
    name = row.optional("id") or content_id(text)
    tags = {tag: value for tag in ("type", "level") if isinstance(value := details.value(tag), str) and value}
    if hops := re.match(r"([2-9])hop", name):
        tags["hops"] = hops[1]
    return Question(text, answers[0], id=name, answers=answers if len(answers) > 1 else (), tags=tags)


def simpleqa(row: Row) -> Question:
    """SimpleQA. Tags: topic, answer_type."""
    text = row.text("problem", "question")
    details = _literal(row, "metadata")
    tags = {tag: str(details[tag]) for tag in ("topic", "answer_type") if details.get(tag)}
    info = {"urls": details["urls"]} if "urls" in details else {}
    return Question(text, row.text("answer"), info, id=row.optional("id") or content_id(text), tags=tags)


def _literal(row: Row, column: str) -> Mapping[str, object]:
    """A column that holds the Python literal of a dict; {} where it is not there."""
    text = row.optional(column)
    if not text:
        return {}
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{row.place(column)}: expected the literal of a dict, e.g. {{'topic': 'Art'}}")
    return found


def frames(row: Row) -> Question:
    """FRAMES. Tag reasoning: its reasoning types."""
    text = row.text("Prompt")
    links = [row.optional(name) for name in row.names if name.startswith("wikipedia_link_")]
    kinds = row.optional("reasoning_types")
    return Question(
        text,
        row.text("Answer"),
        {"urls": [link for link in links if link]},
        id=row.optional("", "index", "Unnamed: 0") or content_id(text),
        tags={"reasoning": kinds} if kinds else {},
    )


SOURCES: Mapping[str, Reader] = {
    "jsonl": own,
    "gaia": gaia,
    "xbench": xbench,
    "browsecomp": browsecomp,
    "webwalker": webwalker,
    "flashrag": flashrag,
    "simpleqa": simpleqa,
    "frames": frames,
}
"""Name of a source -> how a row of it becomes a question."""
