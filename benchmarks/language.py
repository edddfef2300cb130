"""Time fine-tuning steps of a language model against a bare transformers loop; see README.md beside this file."""

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import transformers
from measure import in_turns, machine, ratios, spread

from deltafl.models import load_net
from deltafl.tasks import DataRecipe, load_task
from deltafl.training import TrainingRecipe
from deltafl.training.loop import Run
from deltafl.training.step import batches, lr_at

TARGET = 1.1
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder (default: a new Llama of 8 layers on bytes)")
    parser.add_argument("--data", help="a task of text, as --data takes it (default: 400 sums)")
    parser.add_argument("--data-dir")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5, help="of each turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns, of both in each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the target is missed")
    return parser.parse_args()


def new_llama(folder: Path) -> str:
    """A Llama with random weights on bytes."""
    transformers.ByT5Tokenizer().save_pretrained(folder)
    config = transformers.LlamaConfig(vocab_size=384, num_attention_heads=8, **SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def sums(folder: Path) -> str:
    """Questions and answers, some 200 bytes each."""
    rows = [
        {"prompt": f"{i} + 1 is what? " * 6, "response": f"It is {i + 1}. " * 6} for i in range(400)
    ]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "sums.jsonl")


class Bare:
    """The loop as it is written by hand, on the same batches."""

    def __init__(self, model: str, run: Run) -> None:
        self.run, self.device = run, run.net.device
        kind = transformers.AutoModelForCausalLM
        self.model = kind.from_pretrained(model, dtype=torch.float32).to(self.device).train()
        self.model.config.use_cache = False
        recipe = run.recipe
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        warmup = recipe.warmup_steps(run.examples)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: lr_at(step, run.total, warmup, 1.0)
        )
        ids, lengths = torch.arange(run.examples), run.task.lengths("train")
        self.batches = batches(ids, recipe.batch_size, recipe.seed, run.total, lengths=lengths)

    def advance(self) -> torch.Tensor:
        batch = self.run.task.batch("train", next(self.batches), self.device)
        del batch["rows"]
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.recipe.grad_clip)
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad()
        return loss.detach()


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as name:
        folder = Path(name)
        model, data = options.model or new_llama(folder), options.data or sums(folder)
        net = load_net(model)
        source = DataRecipe.of(data=data, data_dir=options.data_dir, max_length=options.max_length)
        task = load_task(source, net.inputs, 0)
        steps = options.steps * (options.repeats + 2) + 2
        given = {"batch_size": options.batch_size, "steps": steps, "lr": 1e-4, "warmup": 10}
        recipe = TrainingRecipe.of(model=model, data=data, device=options.device, **given)
        run = Run(net, task, recipe, None)
        bare = Bare(model, run)
    for _ in range(2):
        torch.testing.assert_close(run.advance(), bare.advance(), rtol=1e-3, atol=1e-4)

    def turn(loop: Run | Bare) -> float:
        for _ in range(options.steps):
            loss = loop.advance()
        return loss.item()

    times = in_turns(
        {"deltafl": lambda: turn(run), "bare loop": lambda: turn(bare)}, options.repeats
    )
    ratio = ratios(times, "deltafl", "bare loop")
    parameters = sum(p.numel() for p in net.module.parameters())
    name = torch.cuda.get_device_name() if run.net.device.type == "cuda" else machine()
    command = " ".join(["python benchmarks/language.py", *sys.argv[1:]])
    print(f"`{command}`, {date.today()}, {name}, torch {torch.__version__}.\n")
    print(f"{parameters:,} parameters, {options.batch_size} examples a step; seconds of a step:\n")
    print("| deltafl | bare loop | ratio |\n|--:|--:|--:|")
    both = (spread([t / options.steps for t in own], 4) for own in times.values())
    print(f"| {' | '.join(both)} | {spread(ratio)} |")
    missed = median(ratio) > TARGET
    print(f"\nTarget: {TARGET} times the bare loop; {'missed' if missed else 'reached'}.")
    return int(options.check and missed)


if __name__ == "__main__":
    sys.exit(main())
