"""What the trainer calls a version of its weights: `<role>.e<epoch>.v<version>`.

Labels of one role are ordered, epoch first, because a trainer that went back to a checkpoint publishes the same version
numbers again. What another role's trainer has published is never taken for a version of one's own.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from mgrpo.errors import ConfigError
from mgrpo.weights.version import Weights


class Label(NamedTuple):
    """(epoch of the trainer, policy version); of one role the newer one is the greater one."""

    epoch: int
    version: int
    role: str = ""

    def __str__(self) -> str:
        return f"{self.role}{'.' if self.role else ''}e{self.epoch}.v{self.version}"


def parse_label(text: str) -> Label | None:
    """None for what is no label, such as a server's own before the first update."""
    match = re.fullmatch(r"(?:([^\s/]+)\.)?e(\d+)\.v(\d+)", text)
    return Label(int(match[2]), int(match[3]), match[1] or "") if match else None


def label_of(weights: Weights) -> Label:
    """Raises ConfigError for weights whose label is none, or that of another version."""
    label = parse_label(weights.label)
    if label is None or label.version != weights.version:
        raise ConfigError(
            f"weights of version {weights.version} are labelled {weights.label!r}; expected <role>.e<epoch>.v<version>"
        )
    return label
