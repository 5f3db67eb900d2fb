"""JSON for readers of JSON and of YAML, which takes every JSON document (`docker compose`, `kubectl`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

# Characters that YAML does not take as they are. Others stay: YAML knows no pairs of surrogates, so the escapes that
# JSON has for characters beyond the first plane would be read as two others.
_ODD = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")


def document(tree: Mapping[str, Any]) -> str:
    """The text of one file."""
    text = json.dumps(tree, ensure_ascii=False, indent=2)
    return _ODD.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"
