"""The network, the data and the local steps that all contenders share. Torch alone, so that Flower's own environment,
which has no deltafl, imports the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, FEATURES = 10, 32


@dataclass(frozen=True)
class Setting:
    """Every client takes part in every round; each has `examples` images of its own."""

    clients: int = 10
    examples: int = 1000
    steps: int = 20
    batch: int = 32
    rounds: int = 13
    lr: float = 0.05
    momentum: float = 0.9


class Mlp(nn.Module):
    """28 x 28 pixels -> `width` -> 32 features: 26,176 parameters with a width of 32."""

    input_size, channels, mean, std = 28, 1, (0.5,), (0.25,)

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(784, width), nn.Linear(width, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(1)).relu()).relu()


def make_data(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """uint8 images (count, 1, 28, 28), noise around one picture for each class, and int64 labels (count,)."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(
        0, 200, (CLASSES, 1, 28, 28), generator=torch.Generator().manual_seed(99)
    )
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    noise = torch.randint(0, 256, (count, 1, 28, 28), generator=generator)
    return ((pictures[labels] + 2 * noise) // 3).to(torch.uint8), labels


def make_head() -> tuple[Tensor, Tensor]:
    """Weight (10, 32) and bias (10,) of the classifier, which nobody trains."""
    weight = torch.empty(CLASSES, FEATURES).uniform_(
        -0.3, 0.3, generator=torch.Generator().manual_seed(1)
    )
    return weight, torch.zeros(CLASSES)


def shards(setting: Setting) -> Sequence[Tensor]:
    """Rows of each client."""
    return torch.arange(setting.clients * setting.examples).split(setting.examples)


def shuffled(rows: Tensor, setting: Setting) -> Iterator[Tensor]:
    """The rows of each step's batch: permutations cut into batches."""
    steps = 0
    while True:
        for batch in rows[torch.randperm(len(rows))].split(setting.batch):
            if steps == setting.steps:
                return
            yield batch
            steps += 1


def train_locally(
    net: nn.Module,
    head: tuple[Tensor, Tensor],
    images: Tensor,
    labels: Tensor,
    batches: Iterator[Tensor],
    setting: Setting,
) -> None:
    """SGDM steps on `net`, as a short script would write them: torch.optim.SGD, the batch normalised in its step."""
    optimiser = torch.optim.SGD(net.parameters(), setting.lr, setting.momentum)
    net.train()
    for rows in batches:
        x = (images[rows].float() / 255 - Mlp.mean[0]) / Mlp.std[0]
        loss = F.cross_entropy(F.linear(net(x), *head), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def bare_round(
    net: nn.Module,
    server: Mapping[str, Tensor],
    head: tuple[Tensor, Tensor],
    images: Tensor,
    labels: Tensor,
    batches: Sequence[Iterator[Tensor]],
    setting: Setting,
) -> dict[str, Tensor]:
    """Load the server's state, train, add the client's share, for each client; the new server state."""
    total = {name: torch.zeros_like(tensor) for name, tensor in server.items()}
    for own in batches:
        net.load_state_dict(server)
        train_locally(net, head, images, labels, own, setting)
        for name, tensor in net.state_dict().items():
            total[name].add_(tensor, alpha=1 / len(batches))
    return total
