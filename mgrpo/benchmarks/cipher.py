"""The two ciphers under which benchmarks are published, so that their text does not end in training data.

    xbench      text XOR the row's canary, repeated                  (xbench-DeepSearch)
    browsecomp  text XOR SHA-256(the row's canary), repeated         (BrowseComp)

Both are base64 of the bytes. They hide nothing from a reader, who has the canary beside the text: what keeps them
useful is that decrypted rows are never written to a disk. Decrypt in memory only.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Literal

import numpy as np

Cipher = Literal["xbench", "browsecomp"]


def decrypt(cipher: Cipher, text: str, canary: str) -> str:
    """The plain text. Raises ValueError, which quotes nothing of it, where `text` is no base64, the canary is empty or
    the result no UTF-8."""
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("no base64") from None
    try:
        return _xor(data, _key(cipher, canary)).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("does not decrypt to text: the canary is that of another row or set") from None


def encrypt(cipher: Cipher, text: str, canary: str) -> str:
    """What decrypt() reads, e.g. to publish a set of one's own this way. Raises ValueError for an empty canary."""
    return base64.b64encode(_xor(text.encode("utf-8"), _key(cipher, canary))).decode("ascii")


def _key(cipher: Cipher, canary: str) -> bytes:
    if not canary:
        raise ValueError("the canary is empty")
    key = canary.encode("utf-8")
    return hashlib.sha256(key).digest() if cipher == "browsecomp" else key


def _xor(data: bytes, key: bytes) -> bytes:
    repeated = np.resize(np.frombuffer(key, np.uint8), len(data))
    return np.bitwise_xor(np.frombuffer(data, np.uint8), repeated).tobytes()
