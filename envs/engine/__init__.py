"""The rollout engine: outcomes and latency tokens, batched, shared and stored."""

from envs.engine.engine import Outcome, RolloutEngine
from envs.engine.single_request import Steering
from envs.engine.store import OutcomeStore, export_parquet, open_existing

__all__ = ["Outcome", "OutcomeStore", "RolloutEngine", "Steering", "export_parquet", "open_existing"]
