"""TRL's trainer as the trainer of one agent: a run with it ends where a run with our own trainer ends, also when it is
killed on the way, and settings that the run decides are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

from mgrpo.errors import ConfigError  # noqa: E402
from mgrpo.integrations.trl import AgentTrainer  # noqa: E402
from tests import trl_cases as cases  # noqa: E402

ROOT = Path(__file__).parent.parent
RUN = ROOT / "tests" / "relay.toml"
SETTINGS = ("trainer.steps=5", "trainer.checkpoint_every=2", "eval.validation=0", "eval.heldout=0")
EXTERNAL = "agents.left.policy.trainer=external"

PROGRAM = """
import sys
from mgrpo.integrations.trl import AgentTrainer
from tests import trl_agent_args
run, out, overrides, how = sys.argv[1], sys.argv[2], sys.argv[3:-1], sys.argv[-1]
AgentTrainer(run, role="left", out=out, overrides=overrides, **trl_agent_args.given(out, how)).train()
"""
