"""GRPO: pure arithmetic (`advantages`, `losses`, `lagrangian`, `minibatches`), then RLlib; `algorithm` is the loop."""
