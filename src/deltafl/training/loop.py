"""The one loop of training: fine-tuning and the centralised baseline are its two faces."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor

from deltafl.algebra.tensors import device_named
from deltafl.errors import DeltaflError
from deltafl.models import HeadFit, Net
from deltafl.models.pretrained import recompute_activations
from deltafl.progress import OnProgress, Progress
from deltafl.seeding import keyed_generator
from deltafl.tasks import Task
from deltafl.training.recipe import TrainingRecipe
from deltafl.training.record import Row
from deltafl.training.step import batches, keyed_dropout, lr_at, scores, train_step


@dataclass
class Best:
    """What was best on validation: its score, the epoch or round after which it was, its values,
    and how many validations there were since. Of equal scores the first is the best.
    """

    score: float = -math.inf
    after: int = 0
    waited: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def see(self, score: float, after: int, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Take note of a model."""
        self.waited += 1
        if score > self.score:
            self.score, self.after, self.waited, self.tensors = score, after, 0, tensors()

    def exhausts(self, patience: int | None) -> bool:
        """Whether there was no better one for as many validations as that."""
        return patience is not None and self.waited >= patience


class Run:
    """Training under way: a copy of the model in float32 on its device, the optimiser, the steps
    done and the best model yet. A state that `state` gave continues to the same bits on a CPU.

    Started by `accelerate launch` on P processes, each takes every P-th example of each batch and
    gradients are summed once per step: the result equals one process's up to rounding. Deviation:
    batch norm, if a model has it, sees its own process's part of a batch.

    Raises:
        DeltaflError: a task without training or validation examples, no such device, a head that
            cannot be had.
    """

    def __init__(self, net: Net, task: Task, recipe: TrainingRecipe, state: Row | None) -> None:
        self.recipe, self.examples = recipe, task.size("train")
        device: torch.device | str = device_named(recipe.device)
        self.processes = PartialState(cpu=recipe.device == "cpu")
        self.processes.wait_for_everyone()
        if self.processes.num_processes > 1:
            device = str(self.processes.device)
        self.net, self.task = net.copy_to(device), task.to(device)
        self.net.module.float()
        if state is not None:
            self.net.restore(state["net"])
        else:
            self.net.prepare(task, recipe.head, HeadFit(recipe.seed, autocast=recipe.autocast))
        if recipe.gradient_checkpointing:
            recompute_activations(self.net.module)
        broadcast(self.net.module.state_dict())  # prepared apart, last bits may differ
        self.optimiser = _optimiser(self.net, recipe)
        self.total = recipe.num_steps(self.examples)
        self.per_epoch = recipe.steps_in_epoch(self.examples)
        self.step, self.best = 0, Best()
        self.losses = torch.zeros((), device=self.net.device)
        if state is not None:
            self.step, self.best = state["step"], Best(**state["best"])
            self.losses = state["losses"].to(self.net.device)
            self.optimiser.load_state_dict(state["optimiser"])
        self._batches = batches(
            torch.arange(self.examples),
            recipe.batch_size,
            recipe.seed,
            self.total,
            first=self.step,
            lengths=task.lengths("train"),
        )

    def state(self) -> Row:
        """All that a resumed run needs."""
        return {
            "step": self.step,
            "losses": self.losses,
            "best": vars(self.best),
            "net": self.net.snapshot(),
            "optimiser": self.optimiser.state_dict(),
        }

    @property
    def epoch(self) -> int:
        """The number of the epoch, from 1, that the last step was in; 0 before it."""
        return math.ceil(self.step / self.per_epoch)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        recipe = self.recipe
        warmup = recipe.warmup_steps(self.examples)
        return lr_at(self.step, self.total, warmup, recipe.lr, recipe.lr_schedule)

    def advance(self) -> Tensor:
        """One step; the loss of its batch."""
        recipe, rank = self.recipe, self.processes.process_index
        ids, world = next(self._batches), self.processes.num_processes
        generator = keyed_generator(recipe.seed, "augment", self.step)
        batch = self.task.batch("train", ids, self.net.device, generator)
        with keyed_dropout(self.net.device, recipe.seed, self.step, rank):
            loss = train_step(
                self.net,
                self.task,
                {name: tensor[rank::world] for name, tensor in batch.items()},
                self.optimiser,
                lr=self.lr,
                grad_clip=recipe.grad_clip,
                autocast=recipe.autocast,
                micro=recipe.micro_batch_size,
                reduce=(lambda t: cast(Tensor, reduce(t, "sum"))) if world > 1 else None,
            )
        self.step += 1
        self.losses = self.losses + loss * len(ids)
        return loss

    def mean_loss(self) -> float:
        """Of this epoch's examples so far; starts a new sum."""
        seen = (self.step - 1) % self.per_epoch + 1
        mean = self.losses.item() / min(seen * self.recipe.batch_size, self.examples)
        self.losses = torch.zeros_like(self.losses)
        return mean

    def validate(self) -> float:
        """The mean score on validation; the main process's, so that all stop at the same time."""
        self.check_finite()
        found = scores(self.net, self.task, "val", autocast=self.recipe.autocast)
        mean = found.double().mean().to(self.net.device)
        broadcast(mean)
        return mean.item()

    def check_finite(self) -> None:
        """Raise DeltaflError if a weight is NaN or Inf."""
        if not torch.isfinite(self.net.flat.detach()).all():
            raise DeltaflError(
                f"training diverged: weights are not finite by step {self.step}; use a smaller --lr"
            )


def train(
    run: Run,
    on_progress: OnProgress,
    save: Callable[[Row], None],
    record: Callable[[Row], None] | None,
) -> None:
    """Train to the end of the recipe or of its patience; leaves in the net the best model, or the
    last one where there is but one validation, at the end.

    After each epoch `record` is given a row; after each validation but the last and every
    `save_every` steps `save` is given the state, in the main process.

    Raises:
        DeltaflError: weights that are not finite.
    """
    recipe, main, module = run.recipe, run.processes.is_main_process, run.net.module
    every, started = recipe.eval_every, time.perf_counter()

    def tell(row: Row, validated: bool) -> None:
        row["val_score"] = score = run.validate() if validated else None
        if score is not None:
            values = module.state_dict()
            run.best.see(score, run.epoch, lambda: {n: t.clone() for n, t in values.items()})
        if main and record is not None:
            record(row)
        shown = {k: row[k] for k in ("train_loss", "val_score") if row.get(k) is not None}
        on_progress(Progress("epochs", run.epoch, math.ceil(run.total / run.per_epoch), shown))

    if every and not run.step:
        tell({"event": "start", "epoch": 0, "parameters": run.net.flat.numel()}, True)
    while run.step < run.total and not run.best.exhausts(recipe.patience):
        rate, loss = run.lr, run.advance()
        last, validated = run.step == run.total, False
        if last or run.step % run.per_epoch == 0:
            validated = every is not None and (last or run.epoch % every == 0)
            row = {"event": "epoch", "epoch": run.epoch, "step": run.step, "lr": rate}
            row |= {"train_loss": run.mean_loss(), "seconds": time.perf_counter() - started}
            tell(row, validated)
            started = time.perf_counter()
        if not last and (validated or (recipe.save_every and run.step % recipe.save_every == 0)):
            run.check_finite()
            if main:
                save(run.state())
        on_progress(Progress("steps", run.step, run.total, {"loss": loss}))
    if every:
        module.load_state_dict(run.best.tensors)
    else:
        run.best = Best(run.validate(), run.epoch)


def _optimiser(net: Net, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    decay = recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW([net.flat], recipe.lr, weight_decay=decay, fused=True)
    return torch.optim.SGD(
        [net.flat], recipe.lr, recipe.momentum, weight_decay=decay, nesterov=recipe.nesterov
    )
