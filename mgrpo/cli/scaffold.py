"""`mgrpo init-task`: a small working package with a task, to be changed into one's own."""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path

from mgrpo.environments.loader import BUILT_IN
from mgrpo.errors import ConfigError

TEMPLATE = Path(__file__).parent / "template"
NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


def init_task(name: str, out: Path | None) -> Path:
    """Write the package to `out` (default: ./name), which must not exist. Raises ConfigError for a name that is none
    and for a folder that exists or cannot be made."""
    taken = {*sys.stdlib_module_names, *BUILT_IN, "mgrpo", "tests"}
    if not NAME.fullmatch(name) or keyword.iskeyword(name) or name in taken:
        raise ConfigError(
            f"task name {name!r}: expected a small letter, then up to 39 small letters, digits and _, and no name of "
            "Python's or mgrpo's own"
        )
    folder = out or Path(name)
    if folder.exists():
        raise ConfigError(f"{folder} exists; choose another --out")
    class_name = "".join(part.capitalize() for part in name.split("_"))
    class_name += "" if class_name.endswith("Task") else "Task"
    try:
        for source in sorted(TEMPLATE.rglob("*.txt")):
            relative = str(source.relative_to(TEMPLATE)).removesuffix(".txt").replace("my_task", name)
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text(encoding="utf-8")
            target.write_text(text.replace("my_task", name).replace("MyTask", class_name), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror})") from None
    return folder
