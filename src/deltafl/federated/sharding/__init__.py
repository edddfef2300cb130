"""Client sharding: which client holds which samples."""

from deltafl.federated.sharding import dirichlet, iid, non_iid
from deltafl.federated.sharding.base import shard
from deltafl.federated.sharding.description import Description, describe
from deltafl.federated.sharding.recipe import SHARDINGS, ShardingRecipe

__all__ = ["SHARDINGS", "Description", "ShardingRecipe", "describe", "shard"]

_FAMILIES = (dirichlet, iid, non_iid)
"""Imported, so that they register."""
