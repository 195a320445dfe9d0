"""The two-stage controller, and how GRPO on RLlib trains it. Only `grpo/` knows RLlib."""
