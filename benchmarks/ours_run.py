"""The same run by `deltafl.federated.federate`, with all that it writes and a validation and a test. Prints JSON."""

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from mlp import Setting, make_data, make_head

from deltafl.federated import FederatedRecipe, federate
from deltafl.models import load_encoder
from deltafl.models.heads import LinearHead, save_head
from deltafl.tasks.arrays import Split, Task

NAMES = tuple("abcdefghij")


def recipe_of(setting: Setting, **changes: object) -> FederatedRecipe:
    """The setting in deltafl's words."""
    values = {"num_clients": setting.clients, "participation_rate": 1.0, "local_steps": setting.steps,
              "batch_size": setting.batch, "num_rounds": setting.rounds, "lr": setting.lr,
              "momentum": setting.momentum, "eval_every": setting.rounds}  # fmt: skip
    return FederatedRecipe(**{**values, **changes})  # type: ignore[arg-type]


def main() -> None:
    setting = Setting(**json.loads(os.environ["FEDERATED_SETTING"]))
    out, workers = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    train = Split(*make_data(setting.clients * setting.examples))
    task = Task("noise", train, Split(*make_data(100, 1)), Split(*make_data(100, 2)), NAMES)
    out.mkdir(parents=True)
    save_head(LinearHead(*make_head(), NAMES), out / "head.safetensors")
    recipe = recipe_of(setting, head=str(out / "head.safetensors"))
    ends: list[float] = []
    federate(
        load_encoder("mlp:Mlp"), task, recipe, out / "run", device="cpu", workers=workers,
        on_round=lambda row, total: ends.append(time.perf_counter()),
    )  # fmt: skip
    ends = ends[1:]  # the first row is the start's
    print(json.dumps({"rounds": [b - a for a, b in pairwise(ends)]}))


if __name__ == "__main__":
    main()
