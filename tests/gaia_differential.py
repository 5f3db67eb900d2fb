"""mgrpo's GAIA rule against the scorer of inspect-evals, which copies the official one: no pair may differ.

    pip download inspect-evals==0.26.0 --no-deps -d /tmp/gaia
    python -m tests.gaia_differential /tmp/gaia/inspect_evals-0.26.0-py3-none-any.whl --pairs 200000
    python -m tests.gaia_differential WHEEL --write tests/data/gaia_pairs.json     # makes the suite's fixture anew

Only the scorer is read from the wheel, with stand-ins for the modules it imports; the suite needs none of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import types
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mgrpo.scoring.rules import gaia

MEMBER = "inspect_evals/gaia/scorer.py"
Official = Callable[[str, str], tuple[bool, str]]

EDGES = [
    *[
        ("12,345", "12,345"),
        ("12345", "12,345"),
        ("12;345", "12,345"),
        ("12, 345", "12,345"),
        ("12", "12,345"),
    ],
    *[("25", "2.5%"), ("2.5%", "2.5%"), ("2.5", "2.5%"), ("2.5 %", "2.5%"), ("$2.5%", "2.5%")],
    *[
        ("anything", "inf"),
        ("", "inf"),
        ("12", "inf"),
        ("-inf", "inf"),
        ("anything", "infinity"),
        ("x", "-inf"),
    ],
    *[("nan", "nan"), ("x", "nan"), ("nan", "3"), ("NaN, 1", "NaN, 1")],
    *[
        ("\uff14\uff12", "42"),
        ("42", "\uff14\uff12"),
        ("\u0664\u0662", "42"),
        ("\u22125", "-5"),
        ("-5", "\u22125"),
    ],
    *[
        ("$1,234.50", "1234.5"),
        ("1234,5", "1234.5"),
        ("17 km", "17"),
        ("17.0", "17"),
        ("1_7", "17"),
        ("17", "1_7"),
    ],
    *[
        ("1e3", "1000"),
        ("1000", "1e3"),
        (" 17\n", "17"),
        ("%17$", "17"),
        ("", "17"),
        ("0x11", "17"),
        ("+17", "17"),
    ],
    *[
        ("sea gull", "seagull"),
        ("Sea-Gull!", "seagull"),
        ("sea\u00a0gull", "seagull"),
        ("sea gulls", "seagull"),
    ],
    *[
        ("a, b", "a,b"),
        ("a; b", "a,b"),
        ("b, a", "a,b"),
        ("a,b,", "a,b"),
        ("a", "a,b"),
        ("", ","),
        (",", ","),
    ],
    *[
        ("A.,b", "a,b"),
        ("a.,b", "a.,b"),
        ("1, 2.0", "1;2"),
        ("$1, 2%", "1;2"),
        ("x, 2", "1;2"),
        ("x, y", "inf;y"),
    ],
    *[
        ("", ""),
        ("!", ""),
        ("!", "?"),
        ("None", "None"),
        ("none", "None"),
        ("\u0130", "i\u0307"),
        ("STRASSE", "straße"),
    ],
]

WORDS = [
    "Paris",
    "sea gull",
    "São Tomé",
    "St. Petersburg",
    "rock'n'roll",
    "The",
    "a",
    "N/A",
    "東京",
    "1",
    "inf",
    "İzmir",
]
NUMBERS = [
    "0",
    "7",
    "-7",
    "42",
    "3.14",
    "1e3",
    "2.50",
    "12345",
    "0.5",
    "-0",
    "1_000",
    "inf",
    "nan",
    "٤٢",
    "４２",
]
MARKS = [
    "$",
    "%",
    ",",
    ";",
    " ",
    "\n",
    "\t",
    "\u00a0",
    ".",
    "-",
    "!",
    "'",
    '"',
    "(",
    ")",
    "\u2212",
    "_",
    "e",
    "+",
    "0",
    "\u200b",
]


def pairs(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """(answer, gold), the edges first. Half of the answers come from the gold answer by a few changes."""
    yield from EDGES
    rng = random.Random(seed)
    for _ in range(count - len(EDGES)):
        gold = _gold(rng)
        yield (_changed(rng, gold) if rng.random() < 0.7 else _gold(rng)), gold


def _gold(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.3:
        return (
            rng.choice(NUMBERS) if rng.random() < 0.5 else f"{rng.uniform(-2000, 2000):.{rng.randint(0, 3)}f}"
        )
    if kind < 0.65:
        parts = [rng.choice(WORDS if rng.random() < 0.6 else NUMBERS) for _ in range(rng.randint(2, 4))]
        return "".join(part + rng.choice([",", ", ", ";", "; ", " ,"]) for part in parts[:-1]) + parts[-1]
    if kind < 0.9:
        return rng.choice([" ", "-", ""]).join(rng.choice(WORDS) for _ in range(rng.randint(1, 3)))
    return "".join(rng.choice([*MARKS, "x", "Y", "1"]) for _ in range(rng.randint(0, 6)))


def _changed(rng: random.Random, text: str) -> str:
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        at = rng.randint(0, len(text))
        change = rng.randrange(6)
        if change == 0:
            text = text[:at] + rng.choice(MARKS) + text[at:]
        elif change == 1:
            text = text[:at] + text[at + 1 :]
        elif change == 2:
            text = text.swapcase()
        elif change == 3:
            text = rng.choice(["$", " ", ""]) + text + rng.choice(["%", " ", ".", "0", ".0", ",", ""])
        elif change == 4:
            text = text.replace(",", rng.choice([";", ", ", ""]))
        else:
            text = text.replace(" ", rng.choice(["", "  ", "\t"]))
    return text


def official(path: Path) -> Official:
    """question_scorer(model_answer, ground_truth) of a wheel, or of a scorer.py that was unpacked from one."""
    source = zipfile.ZipFile(path).read(MEMBER).decode() if path.suffix == ".whl" else path.read_text("utf-8")
    for name in ("inspect_ai", "inspect_ai.scorer", "inspect_ai.solver"):
        sys.modules.setdefault(name, types.ModuleType(name))

    def decorated(*_: object, **__: object) -> Callable[[Any], Any]:
        return lambda function: function

    stand_ins = {
        "CORRECT": "C",
        "INCORRECT": "I",
        "scorer": decorated,
        "accuracy": decorated,
        "stderr": decorated,
    }
    sys.modules["inspect_ai.scorer"].__dict__.update(stand_ins, Score=object, Scorer=object, Target=object)
    sys.modules["inspect_ai.solver"].__dict__.update(TaskState=object)
    names: dict[str, Any] = {"__name__": "official"}
    exec(compile(source, str(path), "exec"), names)
    logging.getLogger("official").setLevel(logging.ERROR)  # it warns of every answer that is no number
    scorer: Official = names["question_scorer"]
    return scorer


def branch(explanation: str, verdict: bool) -> str:
    """Which rule decided, for the summary: the official scorer says so in words."""
    kind = next(
        kind
        for kind in ("number", "lenghts", "list", "string")
        if kind in explanation.rpartition(" as a ")[2]
    )
    return f"{kind} {'right' if verdict else 'wrong'}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", type=Path, help="write 2,000 pairs and the official verdicts to this file")
    options = parser.parse_args(arguments)
    judge, differing, seen = official(options.path), 0, Counter[str]()
    rows: list[list[object]] = []
    for answer, gold in pairs(2000 if options.write else options.pairs, options.seed):
        verdict, explanation = judge(answer, gold)
        seen[branch(explanation, verdict)] += 1
        rows.append([answer, gold, int(verdict)])
        if bool(gaia(answer, gold)) is not verdict:
            differing += 1
            print(f"answer {answer!r}, gold {gold!r}: official {verdict}")
    print(f"{len(rows)} pairs, {differing} differ; official verdicts: {dict(sorted(seen.items()))}")
    if options.write:
        options.write.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", "utf-8")
    return int(differing > 0)


if __name__ == "__main__":
    raise SystemExit(main())
