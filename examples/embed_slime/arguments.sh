# Sourced by a script that starts slime's train.py: append "${MGRPO_ARGS[@]}" to its arguments.
MGRPO_ARGS=(
   --custom-config-path team.yaml
   --custom-generate-function-path team.generate
   --custom-convert-samples-to-train-data-path mgrpo.integrations.slime.convert_samples
   --dynamic-sampling-filter-path mgrpo.integrations.slime.reward_nonzero
   --custom-rollout-log-function-path mgrpo.integrations.slime.rollout_log
   --custom-megatron-init-path mgrpo.integrations.slime.check
   --advantage-estimator grpo
)
