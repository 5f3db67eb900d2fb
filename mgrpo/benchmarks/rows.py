"""The rows of a local file, whatever its container: each knows where it stands, so that every mistake has a place.

Containers by the file's ending: .jsonl, .json (a list of objects), .csv, .tsv, .parquet. Columns are found without
regard to case, spaces and underscores, because published copies of one data set differ in them (Root_Url, root_url).
Nothing is fetched, and no error quotes a row: it may belong to a set that must not be published.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgrpo.errors import ConfigError

MAX_CELL = 1 << 24  # characters of one cell of a csv or tsv file


@dataclass(frozen=True, slots=True)
class Row:
    """One row. line: of the file where it begins (csv: where it ends), counted from 1; of a parquet file or a JSON list
    the number of the row."""

    file: Path
    line: int
    unit: str
    """What `line` counts: "line" or "row"."""
    columns: Mapping[str, object]
    """Folded name -> value."""
    names: tuple[str, ...]
    """As the file spells them."""

    def place(self, column: str = "") -> str:
        """File, line and column, for errors."""
        return f"{self.file}: {self.unit} {self.line}" + (f", column {column!r}" if column else "")

    def has(self, *names: str) -> bool:
        """Whether one of the columns is there and holds something."""
        return any(self.columns.get(folded(name)) is not None for name in names)

    def value(self, *names: str) -> object:
        """Of the first of these columns that holds something; None where none does."""
        for name in names:
            found = self.columns.get(folded(name))
            if found is not None:
                return found
        return None

    def text(self, *names: str) -> str:
        """A text that is not blank, of the first of these columns; a whole number counts as its digits. Raises
        ConfigError naming the place and what is expected there."""
        found = self.value(*names)
        if found is None:
            raise ConfigError(
                f"{self.place(names[0])}: missing; the file has {', '.join(self.names) or 'none'}"
            )
        return self._text(found, names[0])

    def optional(self, *names: str) -> str:
        """As text(), "" where no column holds anything but spaces."""
        found = self.value(*names)
        if found is None or (isinstance(found, str) and not found.strip()):
            return ""
        return self._text(found, names[0])

    def texts(self, *names: str) -> tuple[str, ...]:
        """A list of texts, none of them blank; () where the column is not there."""
        found = self.value(*names)
        if found is None:
            return ()
        if not isinstance(found, list):
            raise ConfigError(
                f"{self.place(names[0])}: of type {type(found).__name__}, expected a list of texts"
            )
        return tuple(self._text(part, f"{names[0]}[{number}]") for number, part in enumerate(found))

    def table(self, *names: str) -> Mapping[str, object]:
        """An object; {} where the column is not there."""
        found = self.value(*names)
        if found is None:
            return {}
        if not isinstance(found, dict):
            raise ConfigError(f"{self.place(names[0])}: of type {type(found).__name__}, expected an object")
        return found

    def inner(self, *names: str) -> Row:
        """The object in a column as a row of its own, at the same place."""
        return make_row(self.file, self.line, self.unit, self.table(*names))

    def _text(self, value: object, column: str) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise ConfigError(f"{self.place(column)}: of type {type(value).__name__}, expected text")
        if not value.strip():
            raise ConfigError(f"{self.place(column)}: empty, expected text")
        return encodable(value, self.place(column))


def encodable(text: str, place: str) -> str:
    """The text itself. Raises ConfigError for half of a surrogate pair, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place}: character {error.start} is half of a surrogate pair") from None
    return text


def folded(name: str) -> str:
    """A column's name without what published copies differ in."""
    return name.lower().replace("_", "").replace(" ", "")


def make_row(file: Path, line: int, unit: str, columns: Mapping[str, object]) -> Row:
    """A row of columns as the file names them."""
    return Row(file, line, unit, {folded(str(k)): v for k, v in columns.items()}, tuple(map(str, columns)))


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a local file, in its order. Raises ConfigError naming the file, and the line where there is one, for
    what cannot be read."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{path}: expected a file that ends with {', '.join(_READERS)}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; data sets are brought by their user, nothing is fetched")
    try:
        yield from reader(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start})") from None


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield make_row(path, number, "line", _object(line, f"{path}: line {number}"))


def _json(path: Path) -> Iterator[Row]:
    found = _parsed(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(found, list):
        raise ConfigError(f"{path}: of type {type(found).__name__}, expected a list of objects")
    for number, entry in enumerate(found, 1):
        if not isinstance(entry, dict):
            raise ConfigError(f"{path}: row {number}: of type {type(entry).__name__}, expected an object")
        yield make_row(path, number, "row", entry)


def _object(text: str, place: str) -> dict[str, Any]:
    found = _parsed(text, place)
    if not isinstance(found, dict):
        raise ConfigError(f"{place}: of type {type(found).__name__}, expected an object")
    return found


def _parsed(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place}: not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ConfigError(f"{place}: not valid JSON (nested too deeply)") from None


def _csv(path: Path) -> Iterator[Row]:
    yield from _delimited(path, ",")


def _tsv(path: Path) -> Iterator[Row]:
    yield from _delimited(path, "\t")


def _delimited(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
            for cells in rows:
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise ConfigError(
                        f"{path}: line {rows.line_num}: {len(cells)} columns, the first line names {len(names)}"
                    )
                yield make_row(path, rows.line_num, "line", dict(zip(names, cells, strict=True)))
        except csv.Error as error:
            raise ConfigError(f"{path}: line {rows.line_num}: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'{path}: a parquet file needs {error.name}; pip install "mgrpo[research]"'
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for columns in batch.to_pylist():
                    number += 1
                    yield make_row(path, number, "row", columns)
    except pyarrow.ArrowException as error:
        raise ConfigError(
            f"{path}: not a parquet file that can be read ({str(error).splitlines()[0]})"
        ) from None


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
