"""The settings of a sharding."""

from collections.abc import Callable, Iterator
from typing import Annotated, TypeAlias

import numpy as np
from pydantic import Field

from deltafl.recipes import Incidental, Recipe, one_of
from deltafl.registry import Registry
from deltafl.tasks.recipe import DataRecipe


class ShardingRecipe(Recipe):
    """Which clients there are and what each of them holds."""

    num_clients: int = Field(100, ge=1, description="K, the clients in all")
    sharding: Annotated[str, one_of(lambda: SHARDINGS)] = Field(
        "iid", description="who holds which classes (or sources): iid, non_iid or dirichlet"
    )
    nc: int | None = Field(None, ge=1, description="of non_iid: the classes of each client")
    allow_missing_classes: bool = Field(
        False, description="of non_iid: leave classes out where not all can be held"
    )
    alpha: float | None = Field(
        None, gt=0, description="of dirichlet: small is uneven, large is close to iid"
    )

    def problems(self) -> Iterator[str]:
        held = self.model_dump()
        for name, (sharding, needed) in _PARAMETERS.items():
            given = held[name] not in (None, False)
            if given and self.sharding != sharding:
                yield f"{name} is of sharding {sharding}, not of {self.sharding}; leave it out"
            if needed and not given and self.sharding == sharding:
                yield f"sharding {sharding} needs {name}"


class ShardsRecipe(Recipe):
    """Which client would hold which training examples of a task."""

    data: DataRecipe
    sharding: ShardingRecipe = Field(default_factory=ShardingRecipe.of)
    image_size: int = Field(8, ge=1, description="size of images, for a task of your own")
    channels: int = Field(3, ge=1, description="channels of images, for a task of your own")
    seed: int = Field(0, description="of the validation split and of the shards")
    out: Annotated[str | None, Incidental] = Field(
        None, description="a folder for report.html, figure.png and shards.json"
    )
    overwrite: Annotated[bool, Incidental] = Field(False, description="replace an existing output")


_PARAMETERS = {
    "nc": ("non_iid", True),
    "allow_missing_classes": ("non_iid", False),
    "alpha": ("dirichlet", True),
}
"""Setting -> the sharding that it is of, and whether that needs it."""

Sharding: TypeAlias = Callable[[np.ndarray, ShardingRecipe, np.random.Generator], np.ndarray]
"""(sizes of the groups, int64 (L,), all positive; recipe; what is random) -> int64 (K, L), how many
examples of each group each client gets: columns sum to the sizes, or to 0 for a group left out.
There are at least K examples."""

SHARDINGS: Registry[Sharding] = Registry("sharding")
