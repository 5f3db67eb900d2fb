"""Question sets made for tests, in the published forms: no row of a real set is in this repository."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mgrpo.benchmarks.cipher import Cipher, encrypt

CANARY = "made-for-tests:6f0c"
SECRETS = (
    ("w17 w23 w42 w8 w31", "w55 w77"),
    ("w19 w3 w44 w9 w71", "w12 w88"),
    ("w66 w5 w21 w90 w13", "w47 w2"),
)
"""Questions and answers in the words of tests/models.py, so that a tiny policy can be asked."""


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], *, bom: bool = False) -> Path:
    """Comma-separated, or with tabs where the file ends with .tsv."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open("w", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_secret(path: Path, cipher: Cipher = "xbench", pairs: Sequence[tuple[str, str]] = SECRETS) -> Path:
    """An encrypted set, each row under a canary of its own."""
    rows = []
    for number, (question, answer) in enumerate(pairs):
        canary = f"{CANARY}:{number}"
        text, gold = encrypt(cipher, question, canary), encrypt(cipher, answer, canary)
        if cipher == "xbench":
            rows.append(
                {"id": str(number), "prompt": text, "answer": gold, "reference_steps": "", "canary": canary}
            )
        else:
            rows.append({"problem": text, "answer": gold, "problem_topic": "Art", "canary": canary})
    return write_csv(path, rows, bom=True)


def files_with(folder: Path, *texts: str) -> set[str]:
    """Files below a folder whose bytes hold one of the texts."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and any(text.encode() in path.read_bytes() for text in texts)
    }
