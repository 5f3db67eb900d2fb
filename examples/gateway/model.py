"""models/smollm2-tools: SmolLM2-135M-Instruct with a chat template that knows tools, in the Hermes form.

    python examples/gateway/model.py [FOLDER]

SmolLM2's own template of this size has no place for tools, and a gateway refuses what a template would drop. Weights
are a link to those of models/smollm2.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCE, TARGET = ROOT / "models" / "smollm2", ROOT / "models" / "smollm2-tools"
WEIGHTS = "model.safetensors"
TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


def make(source: Path, target: Path) -> None:
    """Write the folder `target`, replacing it. Raises OSError where `source` is no model folder."""
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.name != WEIGHTS:
            shutil.copyfile(file, target / file.name)
    (target / WEIGHTS).symlink_to((source / WEIGHTS).resolve())
    settings["chat_template"] = TEMPLATE
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (target / "tokenizer_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    try:
        make(SOURCE, target)
    except OSError as error:
        sys.exit(f"model: {error}; make smollm2-model takes the model")
    print(f"wrote {target}")
