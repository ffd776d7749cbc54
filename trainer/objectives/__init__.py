"""Pure losses."""

from trainer.objectives.objective import LogitObjective, make_objective
from trainer.objectives.penalty import penalty_gradient, penalty_value

__all__ = ["LogitObjective", "make_objective", "penalty_gradient", "penalty_value"]
