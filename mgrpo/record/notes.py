"""What a record says of itself: that something was not recorded from some step on, and why.

    <folder>/notes.txt = lines of text, filled up with line ends to a fixed size

The file gets its full size when recording begins and is overwritten in place, so that a note still fits on a disk that
has become full.
"""

from __future__ import annotations

from pathlib import Path

from mgrpo.files import write_atomic

NOTES = "notes.txt"
_BYTES = 4096


class Notes:
    """The notes of one folder; those of earlier processes stay until the newer ones need their room."""

    def __init__(self, folder: Path) -> None:
        """Makes the file where there is none. Raises OSError."""
        self._path = folder / NOTES
        if not self._path.exists():
            write_atomic(self._path, b"\n" * _BYTES)

    def add(self, text: str) -> None:
        """Append one line. Raises OSError."""
        lines = [*read_notes(self._path.parent), " ".join(text.split())]
        data = "\n".join(lines).encode("utf-8", "replace")[-_BYTES:]
        with self._path.open("r+b") as file:
            file.write(data.ljust(_BYTES, b"\n"))


def read_notes(folder: Path) -> list[str]:
    """The notes of a folder, oldest first; [] where there are none."""
    try:
        text = (folder / NOTES).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip("\0 ")]
