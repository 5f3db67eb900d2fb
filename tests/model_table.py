"""The table of models in docs/models.md, made by running all of it.

python -m tests.model_table            print it
python -m tests.model_table --write    put it into docs/models.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.model_rows import COLUMNS, ROWS, Row, compare_ranks, make, run
from tests.ranks import ranks_of

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
HEAD = ("model", "class", *COLUMNS, "two ranks")
BEGIN, END = "<!-- python -m tests.model_table --write -->\n", "<!-- end of the table -->\n"


@contextmanager
def at_work(folder: Path, titles: Sequence[str]) -> Iterator[Callable[[], dict[str, Any]]]:
    """Two ranks at work on the rows in `folder`; called, it waits for what they found."""
    with ranks_of("tests.model_ranks", str(folder), *titles) as wait:

        def found() -> dict[str, Any]:
            wait()
            result: dict[str, Any] = torch.load(folder / "found.pt", weights_only=True)
            return result

        yield found


def prepare(folder: Path, titles: Sequence[str]) -> list[Row]:
    rows = [Row(title, folder / title) for title in titles]
    for row in rows:
        row.kind = make(row.title, row.start)
    return rows


def all_rows(folder: Path) -> list[Row]:
    """Every row with its cells, or with the error that its checks met."""
    rows = prepare(folder, list(ROWS))
    with at_work(folder, list(ROWS)) as wait:
        for row in rows:
            with row.keeping_errors():
                run(row)
        found: Mapping[str, Any] | Exception
        try:
            found = wait()
        except AssertionError as error:
            found = error
    for row in rows:
        with row.keeping_errors():
            if isinstance(found, Exception):
                raise found
            row.cells["two ranks"] = compare_ranks(row, found[row.title])
    return rows


def table(rows: Sequence[Row]) -> str:
    """The table and, below it, what is refused and why. Raises what a check met."""
    lines = [list(HEAD), ["---"] * len(HEAD)]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.error is not None:
            raise row.error
        lines.append([row.title, f"`{row.kind}`", *(row.cells.get(column, "") for column in HEAD[2:])])
        for what, words in row.refusals.items():
            reasons.setdefault((what, words.replace(row.kind, "the model")), []).append(row.title)
    text = "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    notes = (f"- {what}, {', '.join(titles)}: {words}\n" for (what, words), titles in sorted(reasons.items()))
    return text + "\nRefused, and in which words:\n\n" + "".join(notes)


def on_page(page: str) -> str:
    """The table that stands in docs/models.md."""
    return page.partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    with TemporaryDirectory() as folder:
        found = table(all_rows(Path(folder)))
    print(found)
    if "--write" in sys.argv[1:]:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(page.replace(BEGIN + on_page(page) + END, BEGIN + found + END), encoding="utf-8")


if __name__ == "__main__":
    main()
