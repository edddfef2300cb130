"""One local step, used by fine-tuning, the baseline and federated clients, and one evaluation."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from deltafl.models.net import Net
from deltafl.seeding import keyed_generator
from deltafl.sparse.sgdm import SparseSGDM
from deltafl.tasks.task import Batch, Split, Task, check_values

POOL = 32
"""Batches within which examples are put together by length."""


def batches(
    ids: Tensor,
    batch_size: int,
    seed: int,
    steps: int,
    purpose: str = "train",
    first: int = 0,
    lengths: Tensor | None = None,
) -> Iterator[Tensor]:
    """The batches, int64 (B,), of steps `first` .. steps - 1: epoch e is a permutation of `ids`,
    (N,), keyed by (seed, purpose, e) and cut into ceil(N / B) batches, the last one shorter. A
    batch is a function of its step alone, so resuming needs no generator state.

    lengths: of all examples, by id; of each `POOL` batches in a row, the examples are then dealt
    anew, so that those of a batch are alike in length, and the batches shuffled.
    """
    per_epoch = math.ceil(len(ids) / batch_size)
    for epoch in range(first // per_epoch, math.ceil(steps / per_epoch)):
        generator = keyed_generator(seed, purpose, epoch)
        order = ids[torch.randperm(len(ids), generator=generator).to(ids.device)]
        if lengths is not None:
            whole = len(ids) // batch_size * batch_size
            pools, sizes = order[:whole].split(POOL * batch_size), lengths.to(ids.device)
            alike = (_alike(pool, sizes, batch_size, generator) for pool in pools)
            order = torch.cat([*alike, order[whole:]])
        begin, past = first - epoch * per_epoch, steps - epoch * per_epoch
        yield from order.split(batch_size)[max(0, begin) : past]


def _alike(pool: Tensor, lengths: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    rows = pool[lengths[pool].argsort(stable=True)].view(-1, batch_size)
    return rows[torch.randperm(len(rows), generator=generator).to(rows.device)].flatten()


SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "linear": lambda t: 1 - t,
    "step": lambda t: 0.1 ** ((t >= 0.5) + (t >= 0.75)),
}
"""Share of the steps after the warm-up that are done -> share of the learning rate; cosine: arXiv
1608.03983, without restarts; step: arXiv 1512.03385, section 4.2.
"""


def lr_at(step: int, total: int, warmup: int, base_lr: float, schedule: str = "cosine") -> float:
    """Learning rate of step 0 .. total - 1: base_lr (step + 1) / warmup during warm-up, then
    base_lr times what the schedule says of (step - warmup) / (total - warmup).
    """
    if step < warmup:
        return base_lr * (step + 1) / warmup
    return base_lr * SCHEDULES[schedule]((step - warmup) / max(1, total - warmup))


def train_step(
    net: Net,
    task: Task,
    batch: Batch,
    optimiser: torch.optim.Optimizer | SparseSGDM,
    *,
    lr: float,
    grad_clip: float | None = None,
    autocast: torch.dtype | None = None,
    micro: int | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    on_gradients: Callable[[], None] | None = None,
) -> Tensor:
    """One optimiser step on the mean loss of the batch; the module is left in training mode.

    loss = sum_i sums_i / sum_i weights_i of `task.loss`; the gradient's 2-norm over all trained
    tensors is scaled down to `grad_clip`. `optimiser` holds `net.flat`. `micro`: so many examples
    are in memory at a time, and their gradients add up. `reduce` sums a tensor over
    the processes that share a batch, of which each is given a part, perhaps none of it.
    `on_gradients` may change the gradients before they are clipped. Returns the loss, a detached
    scalar on the device.
    """
    flat = net.flat
    assert flat.grad is not None
    flat.grad.zero_()
    if not net.module.training:
        net.module.train()
    size = len(next(iter(batch.values())))
    step = min(micro or size, size)
    total = count = flat.new_zeros(())
    for start in range(0, size, step or 1):
        part = {name: tensor[start : start + step] for name, tensor in batch.items()}
        with nullcontext() if autocast is None else torch.autocast(flat.device.type, autocast):
            sums, weights = task.loss(net, part)
        total, count = total + sums.sum(), count + weights.sum()
        if step < size:
            sums.sum().backward()
            total = total.detach()
    if reduce is not None:
        count = reduce(count)
    loss = total / count
    if loss.requires_grad:
        loss.backward()
    elif step < size:
        flat.grad.div_(count)
    loss = loss.detach()
    if reduce is not None:
        flat.grad.copy_(reduce(flat.grad))
        loss = reduce(loss)
    if on_gradients is not None:
        on_gradients()
    if grad_clip is not None:
        nn.utils.clip_grad_norm_([flat], grad_clip)
    optimiser.param_groups[0]["lr"] = lr
    optimiser.step()
    return loss


@contextmanager
def keyed_dropout(device: torch.device, seed: int, step: int, rank: int) -> Iterator[None]:
    """Dropout as a function of (seed, step, rank), so that a resumed run draws the same; global
    state is kept. A federated client has its round and its own number for the last two.
    """
    key = keyed_generator(seed, "dropout", step, rank).initial_seed()
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.random.default_generator.manual_seed(key)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(key)
        yield


@torch.inference_mode()
def scores(
    net: Net,
    task: Task,
    split: Split,
    ids: Tensor | None = None,
    batch_size: int = 256,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """`task.score` of the examples at `ids`, int64 (n,), or of all; float32 (n,) on the CPU. The
    module is left in eval mode.

    Raises:
        DeltaflError: the task does not give one score, a float number, for each example.
    """
    ids = torch.arange(task.size(split)) if ids is None else ids.cpu()
    if net.module.training:  # it takes as long as a small batch
        net.module.eval()
    lengths, parts = task.lengths(split), []
    order = torch.arange(len(ids)) if lengths is None else lengths[ids].argsort(stable=True)
    for part in ids[order].split(batch_size) if len(ids) else ():
        batch = task.batch(split, part, net.device)
        with nullcontext() if autocast is None else torch.autocast(net.device.type, autocast):
            parts.append(task.score(net, batch).float().cpu())
    found = torch.cat(parts) if parts else torch.empty(0)
    check_values(task, "score", found, len(ids), finite=False)
    return found[order.argsort()]
