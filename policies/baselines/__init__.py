"""What the controller is compared with: ways to act on observations; `rules` are fitted on outcomes of all plans."""

from policies.baselines.acting import Baseline, FixedKnobs, LookupKnobs, RandomKnobs

__all__ = ["Baseline", "FixedKnobs", "LookupKnobs", "RandomKnobs"]
