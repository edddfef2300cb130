"""Add, negate and combine task vectors, on scikit-learn's digits and a small network. About ten seconds.

python examples/task_vector_algebra.py
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from deltafl import TaskVector

Data = tuple[Tensor, Tensor]


def trained(model: nn.Module, data: Data, steps: int) -> nn.Module:
    """A copy of `model`, trained on `data`."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    return model


def accuracy(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return (model(data[0]).argmax(1) == data[1]).double().mean().item()


def main() -> dict[str, tuple[float, float]]:
    """(accuracy before, after) of each operation, on images that nothing was trained on."""
    pixels, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    plain = pixels.float() / 16

    def part(images: Tensor, keep: Tensor, *, test: bool = False) -> Data:
        rows = keep & ((torch.arange(len(labels)) % 4 == 0) == test)
        return images[rows], labels[rows]

    every, low, three = labels >= 0, labels < 5, labels == 3
    upside_down = plain.flip(1)
    mirrored = plain.view(-1, 8, 8).flip(2).reshape(-1, 64)
    grey = (plain + 0.7).clamp(max=1)  # ink on grey paper
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    base = trained(network, part(plain, every), 100)

    # Addition: one model for two tasks.
    tasks = (upside_down, mirrored)
    vectors = [
        TaskVector.from_checkpoints(base, trained(base, part(images, every), 60))
        for images in tasks
    ]
    both = sum(vectors).apply_to(base)
    results = {}
    for name, images in (("addition, upside down", upside_down), ("addition, mirrored", mirrored)):
        test = part(images, every, test=True)
        results[name] = accuracy(base, test), accuracy(both, test)

    # Negation: forget one digit.
    learned = TaskVector.from_checkpoints(base, trained(base, part(plain, three), 20))
    forgetful = (-learned).apply_to(base, scaling_coef=1.0)
    for name, keep in (("negation, digit 3", three), ("negation, the others", ~three)):
        test = part(plain, keep, test=True)
        results[name] = accuracy(base, test), accuracy(forgetful, test)

    # Analogy: white paper is to grey paper with low digits as it is with high digits.
    a, b, c = (
        TaskVector.from_checkpoints(base, trained(base, data, 20))
        for data in (part(plain, low), part(grey, low), part(plain, ~low))
    )
    test = part(grey, ~low, test=True)
    results["analogy"] = accuracy(base, test), accuracy((c + (b - a)).apply_to(base), test)
    return results


if __name__ == "__main__":
    for operation, (before, after) in main().items():
        print(f"{operation:21} base {before:6.1%}   with task vectors {after:6.1%}")
