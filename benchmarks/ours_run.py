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
from deltafl.models import HEAD_FILE, Head, load_net
from deltafl.models.head import save_head
from deltafl.progress import Progress
from deltafl.tasks import Images, ImageTask

NAMES = tuple("abcdefghij")


def recipe_of(setting: Setting, **changes: object) -> FederatedRecipe:
    """The setting in deltafl's words."""
    values = {"model": "mlp:Mlp", "data": "noise", "device": "cpu", "num_clients": setting.clients,
              "participation_rate": 1.0, "local_steps": setting.steps, "batch_size": setting.batch,
              "num_rounds": setting.rounds, "lr": setting.lr, "momentum": setting.momentum,
              "eval_every": setting.rounds}  # fmt: skip
    return FederatedRecipe.of(**{**values, **changes})


def task_of(setting: Setting) -> ImageTask:
    """Noise around one picture for each class."""
    parts = {"train": (setting.clients * setting.examples, 0), "val": (100, 1), "test": (100, 2)}
    splits = {split: Images(*make_data(*part)) for split, part in parts.items()}
    return ImageTask("noise", splits, NAMES)


def save_frozen_head(folder: Path) -> str:
    """A file with the head that nobody trains."""
    folder.mkdir(parents=True, exist_ok=True)
    save_head(Head(*make_head(), NAMES), folder / HEAD_FILE)
    return str(folder / HEAD_FILE)


def main() -> None:
    setting = Setting(**json.loads(os.environ["FEDERATED_SETTING"]))
    out, workers = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    head = save_frozen_head(out)
    recipe = recipe_of(setting, head=head, out=str(out / "run"), workers=workers)
    ends: list[float] = []

    def told(progress: Progress) -> None:
        ends.append(time.perf_counter())

    federate(load_net("mlp:Mlp"), task_of(setting), recipe, on_progress=told)
    ends = ends[1:]  # the first is the start's
    print(json.dumps({"rounds": [b - a for a, b in pairwise(ends)]}))


if __name__ == "__main__":
    main()
