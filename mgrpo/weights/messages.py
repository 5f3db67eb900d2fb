"""What trainer and rollout workers say to each other about weights.

    weights.get    {have, pulling, at_least, wait_s} -> label, version and parts of what the asker should pull
    weights.chunk  {kind, label, offset, length}     -> those bytes; label "" when they are gone
    weights.files  {wait_s}                          -> the policy's files without weights

Parts, by kind:

    whole   a version as a safetensors file
    sums    crc32c (u32) of each slice of a version
    patch   what changed from version `base` to version `label` (patch.py)
    files   the policy's files, one after the other
"""

from __future__ import annotations

from typing import Literal

import msgspec

from mgrpo.transport.codec import Count, Name, Signed

Kind = Literal["whole", "sums", "patch", "files"]


class PartIs(msgspec.Struct, array_like=True, frozen=True):
    """`size` bytes with this crc32c (0 of a whole, which has its sums)."""

    kind: Kind
    base: Name
    label: Name
    size: Count
    crc: Count = 0


class GetWeights(msgspec.Struct, array_like=True, frozen=True):
    """have: label of the weights the asker holds ("" for none). whole: it cannot use patches. pulling: a whole version
    that has partly arrived, which it would rather have to its end. at_least: a version that would be of use to it."""

    have: Name = ""
    whole: bool = False
    pulling: Name = ""
    at_least: Signed = 0
    wait_s: float = 0.0


class WeightsAre(msgspec.Struct, array_like=True, frozen=True):
    """label, version: of the newest weights, or of those that are pulled; version -1 when the wait was in vain. layout:
    digest of their layout. No parts: the asker holds them, or servers got them straight from the trainer. probe: token
    ids and their log-probs (nats), of this version."""

    label: Name
    version: Signed
    layout: Name = ""
    parts: list[PartIs] = []
    probe: tuple[list[int], list[float]] | None = None


class GetChunk(msgspec.Struct, array_like=True, frozen=True):
    """Bytes of a part, from `offset` on."""

    kind: Kind
    label: Name
    offset: Count
    length: Count


class GetFiles(msgspec.Struct, array_like=True, frozen=True):
    wait_s: float = 0.0


class FilesAre(msgspec.Struct, array_like=True, frozen=True):
    """The policy's files: name -> bytes; no files when the wait was in vain."""

    label: Name = ""
    files: dict[Name, Count] = msgspec.field(default_factory=dict)
    crc: Count = 0
