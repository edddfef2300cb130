"""A federated round and a merge of the clients' saved models are one computation: the same bits.

python examples/one_server_step.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deltafl import Source, Update, step
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import MergeRecipe
from deltafl.merge.run import run_merge
from deltafl.rules.fednova import FedNova

STEPS = {"alice": 10, "bob": 40, "carol": 20}


def local_training(server: nn.Linear, client: int, steps: int) -> dict[str, torch.Tensor]:
    """The weights of one client after `steps` steps of SGD on data of its own."""
    draw = torch.Generator().manual_seed(client)
    inputs, targets = torch.randn(64, 8, generator=draw), torch.randn(64, 4, generator=draw)
    model = nn.Linear(8, 4)
    model.load_state_dict(server.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    return model.state_dict()


def main(folder: Path) -> bool:
    torch.manual_seed(0)
    server = nn.Linear(8, 4)
    base = server.state_dict()
    clients = {
        name: local_training(server, i, steps) for i, (name, steps) in enumerate(STEPS.items())
    }

    # Federated learning: clients send updates, the server takes a step.
    updates = [
        Update(
            {n: t - base[n] for n, t in clients[name].items()}, Source(name, num_steps=STEPS[name])
        )
        for name in clients
    ]
    after_round = dict(step(base, updates, FedNova(), server_lr=1.0))

    # Merging: the same weights, saved as checkpoints and merged from disk.
    for name, tensors in {"base": base, **clients}.items():
        save_file(tensors, folder / f"{name}.safetensors")
    recipe = MergeRecipe.of(
        base=str(folder / "base.safetensors"),
        models=[str(folder / f"{name}.safetensors") for name in clients],
        num_steps=[STEPS[name] for name in clients],
        method="fednova",
        server_lr=1.0,
    )
    run_merge(plan_merge(recipe), folder / "merged")
    merged = load_file(folder / "merged" / "model.safetensors")

    return after_round.keys() == merged.keys() and all(
        torch.equal(after_round[n], merged[n]) for n in merged
    )


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        print("the same bits:", main(Path(scratch)))
