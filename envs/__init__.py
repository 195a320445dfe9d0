"""The world: knobs, the frozen model, the rollout engine, clocks, tasks, rewards and environments. No Ray in here."""
