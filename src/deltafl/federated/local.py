"""What a client does in a round: its settings, and the algorithms that say how it steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from deltafl.recipes import one_of
from deltafl.registry import Registry
from deltafl.rules.rule import Source
from deltafl.training.recipe import StepRecipe


class LocalRecipe(StepRecipe):
    """How a client trains in a round."""

    local_steps: int = Field(4, ge=1, description="J, the optimiser steps of a client in a round")
    local_steps_spread: float = Field(
        1.0, ge=1, description="S: a client's own number of steps is between J/S and J S"
    )
    local_algorithm: Annotated[str, one_of(lambda: LOCAL_ALGORITHMS)] = Field(
        "sgd", description="what a client does: sgd, fedprox or scaffold"
    )
    prox_mu: float = Field(0.01, ge=0, description="of fedprox: the pull to the server's model")
    client: str | None = Field(
        None, description="a client of your own, module:attr, called with (net, task, recipe)"
    )

    @property
    def algorithm(self) -> "type[Sgd]":
        """The class of `local_algorithm`."""
        return LOCAL_ALGORITHMS[self.local_algorithm]

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.algorithm.has_control and (self.momentum or self.weight_decay):
            yield (
                f"{self.local_algorithm}'s control variates are those of plain SGD; "
                "set momentum and weight_decay to 0"
            )

    def source(self, name: str, num_examples: int, num_steps: int, lr: float) -> Source:
        """What a rule is told of a client's training."""
        mu = self.prox_mu if self.algorithm.has_prox else None
        return Source(name, num_examples, num_steps, lr, self.momentum, mu)


@dataclass(frozen=True)
class Round:
    """One client's part of one round: `number` from 1, who it is, the ids of its training examples,
    how many steps at which lr.

    control: c - c_i of scaffold at the k coordinates that train, (k,) in the order of `net.flat`;
    None for other algorithms.
    """

    number: int
    client: int
    ids: Tensor
    num_steps: int
    lr: float
    control: Tensor | None = None


@dataclass
class Sgd:
    """Plain local SGD; the base of others. One is made for each client's part of a round.

    kept: what trains, (k,), which holds the server's values now. has_prox: there is a proximal term
    of weight prox_mu. has_control: server and clients keep control variates.
    """

    kept: nn.Parameter
    recipe: LocalRecipe
    round: Round
    has_prox: ClassVar = False
    has_control: ClassVar = False

    def __post_init__(self) -> None:
        """Note what is needed of the start."""

    def adjust(self, gradient: Tensor) -> None:
        """Change the gradient (k,) of one step in place, before it is clipped."""

    def control(self) -> Tensor | None:
        """After the last step: the client's new control variate c_i, (k,)."""
        return None


LOCAL_ALGORITHMS: Registry[type[Sgd]] = Registry("local algorithm")
LOCAL_ALGORITHMS.register("sgd")(Sgd)


@LOCAL_ALGORITHMS.register("fedprox")
class FedProx(Sgd):
    """loss + mu/2 ||w - x||^2, x the server's parameters (arXiv 1812.06127)."""

    has_prox = True

    def __post_init__(self) -> None:
        self.start = self.kept.detach().clone()

    def adjust(self, gradient: Tensor) -> None:
        gradient.add_(self.kept.detach() - self.start, alpha=self.recipe.prox_mu)


@LOCAL_ALGORITHMS.register("scaffold")
class Scaffold(Sgd):
    """Gradients corrected by c - c_i; c_i+ = (x - y) / (J lr) - (c - c_i) (arXiv 1910.06378,
    option II).
    """

    has_control = True

    def __post_init__(self) -> None:
        assert self.round.control is not None
        self.start, self.correction = self.kept.detach().clone(), self.round.control

    def adjust(self, gradient: Tensor) -> None:
        gradient.add_(self.correction)

    def control(self) -> Tensor:
        moved = self.start - self.kept.detach()
        return moved / (self.round.num_steps * self.round.lr) - self.correction
