"""GRPO: pure arithmetic (`advantages`, `losses`, `prices`), then RLlib (`rl_module`, `learner`, `runner`, `algorithm`)."""
