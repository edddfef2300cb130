"""Client sharding: which client holds which samples."""

from deltafl.federated.sharding.base import SHARDINGS, Sharding, shard
from deltafl.federated.sharding.description import Description, describe
from deltafl.federated.sharding.dirichlet import Dirichlet
from deltafl.federated.sharding.iid import Iid
from deltafl.federated.sharding.non_iid import NonIid

__all__ = [
    "SHARDINGS",
    "Description",
    "Dirichlet",
    "Iid",
    "NonIid",
    "Sharding",
    "describe",
    "shard",
]

# Called, not used as decorators: a type checker then keeps each family's own constructor.
SHARDINGS.register("iid")(Iid)
SHARDINGS.register("non_iid")(NonIid)
SHARDINGS.register("dirichlet")(Dirichlet)
