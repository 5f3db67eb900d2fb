"""The base of every section of the config tree."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

MAX_SECONDS = 1e7  # of any deadline: four months; the waits of the system overflow further up


class Settings(BaseModel):
    """Base of every section: frozen, no unknown keys, docstrings as descriptions, and no number that is infinite or
    NaN: such a learning rate, weight or deadline is a mistake of whatever wrote the file."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )
