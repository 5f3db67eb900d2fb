"""One agent of a run, trained by TRL's trainer:

    python examples/embed_trl/train_sub.py RUN.toml ROLE OUT [OVERRIDE ...]

while `mgrpo train RUN.toml --out OUT` runs everything else. Overrides are those that the run was started with
(trainer.steps=40). Killed at any moment and started again, it goes on.
"""

from __future__ import annotations

import sys

from trl import GRPOConfig

from mgrpo.integrations.trl import AgentTrainer


def main(run: str, role: str, out: str, *overrides: str) -> None:
    args = GRPOConfig(
        f"{out}/agents/{role}/trl",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        bf16=False,
        use_cpu=True,
        report_to="none",
        logging_steps=5,
        disable_tqdm=True,
        save_total_limit=2,
    )
    AgentTrainer(run, role=role, out=out, args=args, overrides=overrides).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
