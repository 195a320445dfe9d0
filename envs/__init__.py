"""The world: knobs, the frozen model, the engine, clocks, tasks, rewards and environments.

Nothing in here imports Ray.
"""
