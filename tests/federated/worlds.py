"""Small federated worlds: plug-in networks, tasks, and a run's parts before its first round."""

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltafl.federated import FederatedRecipe
from deltafl.federated import federate as run_federated
from deltafl.federated.rounds import RoundResult, Workers, run_round
from deltafl.federated.server import ServerState
from deltafl.federated.setup import Federation, make_shards
from deltafl.federated.setup import begin as begin_run
from deltafl.models import Net, load_net
from deltafl.progress import OnProgress, ignore
from deltafl.tasks import ImageTask, Task, load_task
from deltafl.training import FinishedRun
from tiny_models import tiny_images, tiny_llama, write_lines

RECIPE = FederatedRecipe.of(
    model="federated.worlds:Plain",
    data="tiny_models:tiny_task_factory",
    device="cpu",
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
    """With running statistics and a counter of batches; four values a channel, so that a batch of one will do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.norm.num_batches_tracked.fill_(7)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1)).unflatten(1, (3, 4))
        return self.last(self.norm(hidden).flatten(1).relu())


class Dropping(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.dropout(self.first(x.flatten(1)).relu(), 0.5, self.training))


def plain() -> Net:
    return load_net("federated.worlds:Plain")


def normed() -> Net:
    return load_net("federated.worlds:Normed")


def halves(train: int = 50) -> ImageTask:
    return tiny_images(train)


@cache
def language() -> tuple[Net, Task]:
    """A tiny Llama and lines of two sources."""
    folder = Path(tempfile.mkdtemp(prefix="deltafl-language-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    net = tiny_llama(folder / "model")
    return net, load_task(str(write_lines(folder / "text")), net.inputs)


def federate(
    net: Net, task: Task, recipe: FederatedRecipe, out: Path, *, resume: bool = False,
    on_progress: OnProgress = ignore, **settings: Any,
) -> FinishedRun:  # fmt: skip
    """A run into `out` with other settings than the recipe's."""
    recipe = recipe.replace(out=str(out), **settings)
    return run_federated(net, task, recipe, resume=resume, on_progress=on_progress)


@dataclass(frozen=True)
class Begun:
    federation: Federation
    state: ServerState


def begin(
    folder: Path, recipe: FederatedRecipe, net: Net | None = None, task: Task | None = None
) -> Begun:
    """A run's parts, as `federate` makes them."""
    task = task or halves()
    recipe = recipe.replace(out=str(folder / "run"))
    federation = begin_run(net or plain(), task, recipe, make_shards(task, recipe), begun=False)
    return Begun(federation, federation.initial_state())


def one_round(begun: Begun) -> tuple[ServerState, RoundResult]:
    """The first round, in this process."""
    with Workers(begun.federation, begun.state) as workers:
        return run_round(begun.state, begun.federation, workers)


def assert_same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
