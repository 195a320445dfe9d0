"""The rollout engine: outcomes and latency tokens, batched, shared and stored."""

from envs.engine.engine import Outcome, RolloutEngine
from envs.engine.single_request import Decider
from envs.engine.store import OutcomeStore, export_parquet, open_existing

__all__ = ["Decider", "Outcome", "OutcomeStore", "RolloutEngine", "export_parquet", "open_existing"]
