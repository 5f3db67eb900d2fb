"""The engine in this process, from a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mgrpo.addresses import Addresses
from mgrpo.config import AgentView
from mgrpo.config.engine import HfEngineConfig
from mgrpo.config.policy import PolicyConfig
from mgrpo.engines.backend import EngineBackend
from mgrpo.engines.base import Engine
from mgrpo.model.tokens import Tokenizer

STREAMING_ADMISSION = 4
"""Steps from one admission to the next where rollouts stream: prompts share forwards, and wait 1.5 steps on average."""


class HfBackend(EngineBackend):
    """See mgrpo/engines/hf/engine.py."""

    @classmethod
    def open(
        cls,
        view: AgentView,
        files: Mapping[str, bytes],
        addresses: Addresses,
        on_event: Callable[[str], None],
    ) -> tuple[Engine, Tokenizer]:
        """See EngineBackend."""
        import torch

        from mgrpo.engines.hf.engine import HfEngine
        from mgrpo.model.policy import Policy
        from mgrpo.model.policy_files import policy_from_files

        engine, role = view.owner.engine, view.role
        assert isinstance(engine, HfEngineConfig)
        places = None
        policy: Policy
        if engine.adapters:
            from mgrpo.engines.hf.adapters import open_adapter

            policy = adapted = open_adapter(view, files)
            places = adapted.adapter.places
        else:
            policy = policy_from_files(files, role)
            if engine.device != "cpu" or engine.dtype != "float32":
                model = policy.model.to(device=engine.device, dtype=getattr(torch, engine.dtype))
                # sdpa: the engine brings masks of its own, which packed attention does not take
                how = PolicyConfig(device=engine.device, attention="sdpa", share_prefixes=False)
                policy = Policy(model, policy.tokenizer, role, how)
        # Batches of rollouts move in step by themselves, and their engines' batches must stay what they are.
        made = HfEngine(
            policy,
            slots=view.rollout.slots,
            max_length=view.agent.max_length,
            on_update=engine.on_update,
            places=places,
            admit_every=STREAMING_ADMISSION if view.trainer.max_lag else 1,
            wait_for_calls=view.rollout.wait_for_calls,
            report_experts=view.owner.policy.routing_replay,
        )
        return made, policy.tokenizer
