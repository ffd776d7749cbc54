"""Pure losses."""

from trainer.objectives.objective import Objective, make_objective
from trainer.objectives.penalty import penalty_gradient, penalty_value

__all__ = ["Objective", "make_objective", "penalty_gradient", "penalty_value"]
