"""The rollout engine: outcomes and latency tokens, batched, shared and stored."""

from envs.engine.engine import Outcome, RolloutEngine
from envs.engine.measured import Steering
from envs.engine.store import OutcomeStore, export_parquet, open_existing

__all__ = ["Outcome", "OutcomeStore", "RolloutEngine", "Steering", "export_parquet", "open_existing"]
