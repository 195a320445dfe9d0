"""Environment and model: knobs, frozen model, engine, latency, tasks, reward, environments. No Ray in here."""
