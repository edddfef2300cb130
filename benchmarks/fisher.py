"""Time per-sample Fisher scores against an ordinary forward and backward pass; see README.md beside this file."""

import argparse
import sys
from datetime import date
from statistics import median

import torch
from measure import in_turns, machine, ratios, spread

from deltafl.models import HeadRecipe, new_net
from deltafl.sparse.fisher import FisherScorer
from deltafl.tasks.images import Images, ImageTask

TARGET = 1.5
MODEL = {
    "model_type": "vit",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}
CLASSES = tuple(f"class {k}" for k in range(100))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="turns, of both in each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--batches", type=int, default=2, help="of one call: a client's calibration is 64 examples"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if the target is missed")
    return parser.parse_args()


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    count = options.batch * options.batches
    images = torch.randint(0, 256, (count, 3, 224, 224), generator=generator, dtype=torch.uint8)
    split = Images(images, torch.randint(0, len(CLASSES), (count,), generator=generator))
    task = ImageTask("noise", dict.fromkeys(("train", "val", "test"), split), CLASSES)
    net = new_net(MODEL)
    net.prepare(task, HeadRecipe(head="linear"))
    parameters = [p for p in net.module.parameters() if p.requires_grad]
    scorer = FisherScorer(net, task, "empirical", batch_size=options.batch)

    def scores() -> None:
        scorer(torch.arange(count), torch.Generator())

    def ordinary() -> None:
        for rows in torch.arange(count).split(options.batch):
            losses, _ = task.loss(net, task.batch("train", rows))
            torch.autograd.grad(losses.sum(), parameters)

    net.module.eval()
    times = in_turns(
        {"forward and backward, all parameters": ordinary, "per-sample scores": scores},
        options.repeats,
    )
    command = " ".join(["python benchmarks/fisher.py", *sys.argv[1:]])
    print(
        f"`{command}`, {date.today()}, {machine()}, {options.threads} threads, batch {options.batch}.\n"
    )
    print("| ViT-S/16, 224 px | seconds a batch |\n|---|--:|")
    for name, own in times.items():
        print(f"| {name} | {spread([s / options.batches for s in own])} |")
    found = ratios(times, "per-sample scores", "forward and backward, all parameters")
    verdict = "reached" if median(found) <= TARGET else "missed"
    print(f"\nRatio: {spread(found)}; target {TARGET}, {verdict}.")
    return int(options.check and median(found) > TARGET)


if __name__ == "__main__":
    sys.exit(main())
