"""What decides a federated run."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from deltafl.federated.local import LocalRecipe
from deltafl.federated.server import ServerRecipe
from deltafl.federated.sharding import ShardingRecipe
from deltafl.models.adapter import LoraRecipe
from deltafl.recipes import Incidental
from deltafl.rules.rule import check_rule
from deltafl.seeding import keyed_generator
from deltafl.sparse.recipe import SparseRecipe
from deltafl.training.recipe import RunRecipe
from deltafl.training.step import lr_at


class ClientsRecipe(RunRecipe):
    """A model, a task, and clients that hold its examples: what decides heads and masks."""

    participation_rate: float = Field(
        0.1, gt=0, le=1, description="C, the share of the clients that is asked in each round"
    )
    sharding: ShardingRecipe = ShardingRecipe.of()
    sparse: SparseRecipe = SparseRecipe.of()

    def problems(self) -> Iterator[str]:
        """Shares of the clients that are none, or more than all."""
        clients, chosen = self.sharding.num_clients, self.clients_per_round
        if not chosen:
            yield (
                f"participation_rate {self.participation_rate} of {clients} clients selects no "
                f"client; take at least {1 / clients:g}"
            )
        asked = chosen * self.sparse.calibration_rounds
        if self.sparse.is_calibrated and asked > clients:
            yield (
                f"{self.sparse.calibration_rounds} calibration rounds of {chosen} fresh clients "
                f"each need more than the {clients} clients; lower calibration_rounds or "
                "participation_rate"
            )

    @property
    def clients_per_round(self) -> int:
        """round(C K)."""
        return round(self.participation_rate * self.sharding.num_clients)


class FederatedRecipe(LoraRecipe, ClientsRecipe):
    """A federated run: K clients, a fraction C of them in each round, J local steps each, then one
    server step.
    """

    renamed: ClassVar = {
        "engine": "is gone: the clients of a round train in processes of their own (--workers)",
        "dirichlet_form": "is gone: dirichlet draws a class mix for each client, with equal sizes",
        "attenuate": "is gone: progressive calibration scores the model as it is",
        "aggregator_params": "is gone: parameters of the rule stand beside server.aggregator",
    }

    num_rounds: int = Field(50, ge=1, description="rounds")
    eval_every: int = Field(1, ge=1, description="rounds between validations")
    patience: int | None = Field(
        None, ge=1, description="validations without a gain after which to stop"
    )
    workers: Annotated[int | None, Incidental] = Field(
        None, ge=1, description="processes that train clients; no result depends on it (one a core)"
    )
    save_client_updates: Annotated[tuple[str | int, ...], Incidental] = Field(
        (), description="rounds (or all) whose clients' models are written to OUT/updates"
    )
    lora_down: Literal["residual", "svd", "frozen_a"] = Field(
        "residual",
        description="what clients with a LoRA are sent: that nearest to what was learnt, the rest "
        "going to the weights (residual) or lost (svd); or B alone, A being fixed (frozen_a)",
    )
    local: LocalRecipe = LocalRecipe.of()
    server: ServerRecipe = ServerRecipe.of()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.lora_rank and self.lora_down != "frozen_a" and self.local.algorithm.has_control:
            yield f"{self.local.local_algorithm} with a LoRA needs lora_down frozen_a"
        known = {"all", *map(str, range(1, self.num_rounds + 1))}
        if wrong := [n for n in self.save_client_updates if str(n) not in known]:
            yield (
                f"save_client_updates: {', '.join(map(str, wrong))}; name rounds from 1 to "
                f"{self.num_rounds}, or all"
            )

    def check_rule(self) -> None:
        """Raise DeltaflError if the rule cannot work with the clients of a round, as ours are."""
        if self.local.client is None:
            source = self.local.source("client", 1, 1, self.local.lr)
            check_rule(self.server.rule(), [source] * self.clients_per_round)

    def clients_in(self, number: int) -> list[int]:
        """Who takes part in a round (from 1): round(C K) clients without replacement, ascending; a
        function of (seed, round).
        """
        drawn = keyed_generator(self.seed, "clients", number)
        order = torch.randperm(self.sharding.num_clients, generator=drawn)
        return sorted(order[: self.clients_per_round].tolist())

    def steps_of(self, client: int) -> int:
        """Local steps of a client, the same in every round: round(J S^u), u uniform in [-1, 1], at
        least 1.
        """
        drawn = keyed_generator(self.seed, "local steps", client)
        u = 2 * torch.rand((), generator=drawn).item() - 1
        return max(1, round(self.local.local_steps * self.local.local_steps_spread**u))

    def lr_in(self, number: int) -> float:
        """The local learning rate of a round (from 1)."""
        return lr_at(number - 1, self.num_rounds, 0, self.local.lr, self.local.lr_schedule)
