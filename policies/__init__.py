"""The mind: the two-stage controller, and how GRPO on RLlib trains it. Only `grpo/` knows RLlib."""
