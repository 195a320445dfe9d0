"""GRPO: pure arithmetic (`objective`, `known_plans`, `lagrangian`), then RLlib; `algorithm` is the loop."""
