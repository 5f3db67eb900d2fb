"""One agent of a run, trained by a loop of our own in plain torch:

    python examples/embed_feed/train_sub.py RUN.toml ROLE OUT

while `mgrpo train RUN.toml --out OUT` runs everything else. Killed at any moment and started again, it goes on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import mgrpo


def main(run: str, role: str, out: str) -> None:
    with mgrpo.feed(run, role, out) as feed:
        if feed.agent.loss.kl_coef or feed.config.trainer.old_logprobs == "recompute":
            raise SystemExit("this loop has neither a reference policy nor a forward pass before the step")
        torch.set_num_threads(feed.config.trainer.threads)
        model = AutoModelForCausalLM.from_pretrained(feed.start, dtype=torch.float32).eval()
        o = feed.agent.optimizer
        optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
        checkpoints = Path(out) / "my_checkpoints" / role
        if feed.step:  # what was saved before; start/ holds the weights of step 0 only
            state = torch.load(checkpoints / f"{feed.step}.pt")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        feed.publish(model)

        def keep() -> None:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(checkpoints, feed.step, state)
            feed.saved(feed.step)

        for step in feed:
            for group in optimizer.param_groups:
                group["lr"] = step.lr
            losses = [train(model, optimizer, batch, feed.agent) for batch in step.minibatches]
            feed.applied({"loss/pg": sum(losses) / len(losses)})
            feed.publish(model)
            if feed.step % feed.config.trainer.checkpoint_every == 0:
                keep()
        if feed.step > feed.saved_step:  # the last step, or the last one before a stop
            keep()


def train(model, optimizer, batch, agent) -> float:  # type: ignore[no-untyped-def]
    """One optimizer step. A minibatch in which nothing was better than anything else moves nothing."""
    optimizer.zero_grad()
    total = 0.0
    for micro in (m.rows(m.with_advantage()) for m in batch.micro):
        if not len(micro.lengths):
            continue
        active = micro.active()  # the sampled tokens, packed; the state at t - 1 scores token t
        hidden = model.base_model(input_ids=micro.ids).last_hidden_state[:, :-1][active.mask]  # (T, H)
        loss, _ = mgrpo.linear_grpo_loss(
            hidden, model.get_output_embeddings().weight, active.targets, config=agent.loss,
            advantages=micro.advantages if active.token_advantages is None else None,
            token_advantages=active.token_advantages, cu_seqlens=active.cu_seqlens, seq_weight=micro.weights,
            old_logprobs=active.old_logprobs, rollout_logprobs=active.rollout_logprobs,
            denominator=batch.denominator,
        )  # fmt: skip
        loss.backward()
        total += loss.item()
    if any(p.grad is not None for p in model.parameters()):
        torch.nn.utils.clip_grad_norm_(model.parameters(), agent.optimizer.grad_clip)
        optimizer.step()
    return total


def save(folder: Path, step: int, state: dict[str, object]) -> None:
    """On disk as a whole or not at all; the one before stays, in case we are killed before feed.saved()."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "new").open("wb") as file:
        torch.save(state, file)
        os.fsync(file.fileno())
    (folder / "new").rename(folder / f"{step}.pt")
    for old in sorted(folder.glob("*.pt"), key=lambda path: int(path.stem))[:-2]:
        old.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
