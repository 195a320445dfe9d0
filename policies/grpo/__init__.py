"""GRPO: pure arithmetic (`advantages`, `losses`, `prices`, `minibatches`), then RLlib; `algorithm` is the loop."""
