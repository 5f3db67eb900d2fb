"""Writes docs/config.md from the docstrings of the config tree: python docs/make_config.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mgrpo.config.load import MAY_CHANGE
from mgrpo.config.run import RunConfig

HEAD = """# Configuration

One TOML file (UTF-8) describes a run; the same file starts every part of it. Any field can be overridden on the command
line: `--set trainer.steps=40`. Unknown keys are errors, and so are numbers that are infinite or NaN. Made from the
docstrings in `mgrpo/config/` by `docs/make_config.py`.

`mgrpo train --resume FOLDER --set KEY=VALUE` may change these settings and sections; any other change is refused by the
name of the field, and the folder stays as it was:
"""


def may_change() -> str:
    return ", ".join(f"`{name}`" for name in MAY_CHANGE) + ".\n"


def sections(model: type[BaseModel], path: str) -> list[tuple[str, type[BaseModel]]]:
    """A section and its subsections in the order of the file."""
    found = [(path, model)]
    for name, field in model.model_fields.items():
        inner = field.annotation
        if name == "agents":
            found += sections(model.model_fields[name].annotation.__args__[1], "agents.<role>")
        else:
            place = f"{path}.{name}" if path else name
            if get_origin(inner) is tuple and tables(inner):
                place = f"[{place}]"  # a list of tables
            found += [section for table in tables(inner) for section in sections(table, place)]
    return found


def tables(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field may hold: one, one for each type of a union, or none."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [table for part in get_args(annotation) for table in tables(part)]


def title(path: str, model: type[BaseModel]) -> str:
    """A section's heading; of a table that has several types, with the one that it is."""
    kind = model.model_fields.get("type")
    text = f"[{path}]" if path else "Top level"
    return (
        f'{text} type = "{kind.default}"'
        if kind is not None and kind.default is not PydanticUndefined
        else text
    )


def default_of(field: object) -> str:
    default = getattr(field, "default", PydanticUndefined)
    if isinstance(default, BaseModel) or getattr(field, "default_factory", None):
        return ""
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "unset"
    text = str(default).lower() if isinstance(default, bool) else repr(default)
    return f"`{text}`".replace("'", '"')


def render() -> str:
    """The whole page."""
    lines = [HEAD, may_change()]
    for path, model in sections(RunConfig, ""):
        doc = " ".join((model.__doc__ or "").split())
        lines += [
            f"## {title(path, model)}",
            "",
            doc,
            "",
            "| field | default | meaning |",
            "|---|---|---|",
        ]
        for name, field in model.model_fields.items():
            chosen = name == "type" and field.default is not PydanticUndefined  # stands in the heading
            if tables(field.annotation) or name == "agents" or chosen or field.exclude:
                continue
            text = " ".join((field.description or "").split()).replace("|", "\\|")
            lines.append(f"| `{name}` | {default_of(field)} | {text} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(render(), encoding="utf-8")
