"""Adapters that carry M-GRPO into other trainers. Each imports its host when it is used, not when it is imported."""
