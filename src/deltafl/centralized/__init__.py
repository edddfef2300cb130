"""Centralised training, the baseline of federated runs."""

from deltafl.centralized.recipe import CentralizedRecipe
from deltafl.centralized.run import CentralizedRun, centralize

__all__ = ["CentralizedRecipe", "CentralizedRun", "centralize"]
