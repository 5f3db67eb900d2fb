"""The words of the task atlas: names and values are one word each."""

from __future__ import annotations

import functools

from mgrpo.tasks.atlas.facts import RELATIONS, entities
from mgrpo.tasks.words.protocol import Language


@functools.cache
def language() -> Language:
    """Of all splits."""
    return Language(RELATIONS, entities())
