"""Settings that contradict each other, or that nothing reads, are errors that name the field."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mgrpo import GrpoLossConfig


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("unknown_key", {"unknown_key": 1}),
        ("type: 'ppo' is unknown, expected bnpo, cispo", {"type": "ppo"}),
        ("write type = 'dapo'", {"loss_type": "dapo"}),
        ("options", {"options": {"beta": 1.0}}),
        ("clip_eps_low", {"type": "package.module:Class", "clip_eps_low": 0.1}),
        ("ratio_level", {"type": "gspo", "ratio_level": "token"}),
        ("max_completion_length", {"type": "dr_grpo"}),
        ("max_completion_length", {"max_completion_length": 8}),
        ("delta", {"type": "cispo", "delta": 2.0}),
        ("clip_eps_low", {"type": "cispo", "clip_eps_low": 0.1}),
        ("clip_eps_high", {"type": "sapo", "clip_eps_high": 0.28}),
        ("sapo_temperature_pos", {"sapo_temperature_pos": 2.0}),
        ("veto", {"veto": 1e-4}),
        ("correction_high", {"correction_high": 2.0}),
        ("correction_low", {"correction": "token_tis", "correction_low": 0.5}),
        ("correction_low", {"correction": "mis", "correction_low": 6.0}),
        ("advantage_eps", {"estimator": "rloo", "advantage_eps": 1e-4}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": 1e-40}),
        ("clip_eps_high", {"clip_eps_high": 1e39}),
        ("delta", {"delta": 1e39}),
        ("correction_high", {"correction": "mis", "correction_high": 1e39}),
        ("sapo_temperature_pos", {"type": "sapo", "sapo_temperature_pos": 1e-39}),
        ("log_ratio_clip", {"log_ratio_clip": 89.0}),
        ("log_ratio_clip", {"log_ratio_clip": 0.5}),
        ("entropy_coef", {"entropy_coef": 1e39}),
        ("kl_coef", {"kl_coef": float("nan")}),
        ("kl_bias_correction: True has no effect with kl_coef 0", {"kl_bias_correction": True}),
        (
            "log_ratio_clip: 40.0 is above 30.0",
            {"kl_bias_correction": True, "kl_coef": 0.1, "log_ratio_clip": 40.0},
        ),
    ],
)
def test_bad_settings_name_their_field(field: str, settings: dict[str, object]) -> None:
    """The message holds the field's name."""
    with pytest.raises(ValidationError, match=field):
        GrpoLossConfig.model_validate(settings)


def test_a_dump_is_valid_input_again() -> None:
    """Every field written out, defaults included, is accepted: only a value that differs can be a silent
    no-op."""
    for config in (
        GrpoLossConfig(type="cispo", clip_eps_high=5.0),
        GrpoLossConfig(correction="geometric"),
        GrpoLossConfig(type="package.module:Class", options={"beta": 0.5}),
    ):
        assert GrpoLossConfig.model_validate(config.model_dump()) == config
