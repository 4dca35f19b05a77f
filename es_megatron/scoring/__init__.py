"""Scorers and control arms as objects: what each needs, costs, learns from, and does not go with."""

from __future__ import annotations

from es_megatron.scoring.arms import ARMS, PLAIN, Arm, arm_of, published
from es_megatron.scoring.scorers import SCORERS, Scorer, scorer_of

__all__ = ["ARMS", "PLAIN", "SCORERS", "Arm", "Scorer", "arm_of", "published", "scorer_of"]
