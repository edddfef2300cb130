"""Small federated worlds: two plug-in networks, a task with a remainder, and a run's parts before its first round."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deltafl.federated import FederatedRecipe
from deltafl.federated.controls import Controls
from deltafl.federated.rounds import World
from deltafl.federated.run import make_client, make_world
from deltafl.federated.server import ServerState
from deltafl.federated.setup import Setting, make_shards, set_up
from deltafl.models import LoadedEncoder, load_encoder
from deltafl.models.flat import FlatModel
from tiny_models import tiny_task

RECIPE = FederatedRecipe(
    num_clients=6,
    participation_rate=0.5,
    local_steps=3,
    num_rounds=4,
    batch_size=4,
    lr=0.05,
    seed=3,
    head="linear",
)


class Plain(nn.Module):
    """Two layers; every parameter is used, and names in the file are the module's."""

    input_size, channels, mean, std = 8, 1, (0.25,), (0.5,)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 12)
        self.last = nn.Linear(12, 5)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-0.3, 0.3, generator=draw)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flatten(1)).relu())


class Normed(Plain):
    """With running statistics and a counter of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.norm.num_batches_tracked.fill_(7)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1)).unflatten(
            1, (3, 4)
        )  # four values a channel: a batch of one will do
        return self.last(self.norm(hidden).flatten(1).relu())


class Dropping(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.dropout(self.first(x.flatten(1)).relu(), 0.5, self.training))


def plain() -> LoadedEncoder:
    return load_encoder("federated.worlds:Plain")


def normed() -> LoadedEncoder:
    return load_encoder("federated.worlds:Normed")


@dataclass(frozen=True)
class Begun:
    setting: Setting
    state: ServerState
    world: World


def begin(
    folder: Path, recipe: FederatedRecipe, encoder: LoadedEncoder | None = None, task=None
) -> Begun:
    """A run's parts, as `federate` makes them."""
    task = task or tiny_task()
    model = FlatModel((encoder or plain()).copy_to("cpu"))
    setting, state = set_up(model, task, recipe, make_shards(task, recipe), None)
    return Begun(
        setting,
        state,
        make_world(setting, state, make_client(setting), Controls(folder / "controls")),
    )


def assert_same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
