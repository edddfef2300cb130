"""Merge linear map by linear map, from what each is given on unlabelled examples of the tasks.

Every task is a `Client` with its fine-tune and its examples: it sends sums over rows, the server
adds them, solves for the map and sends it back, as many exchanges as there are maps. Merging in one
place is the same federation in one process.

The passes of all models over all examples go on side by side, from one map to the next: each is a
thread that waits before a map until it is solved, so that nothing is computed twice.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from deltafl.algebra.tensors import Tensors
from deltafl.errors import DeltaflError
from deltafl.files import write_atomically
from deltafl.merge.maps import Map, Pass, Read, find_maps, sums
from deltafl.models.net import Net
from deltafl.progress import OnProgress, Progress, ignore
from deltafl.rules.regression import regressed
from deltafl.rules.rule import LayerRule
from deltafl.seeding import keyed_generator
from deltafl.tasks.task import Split, Task

FALLBACK = "-mean"
"""In the name of a file with a map whose sums were singular."""


@dataclass(frozen=True)
class Examples:
    """A fine-tune, whole under the base's names, and its task, by whose examples it is merged.

    net: takes the task's inputs; all nets of a merge share their tensors. weight: p_t.
    """

    net: Net
    task: Task
    tuned: Tensors
    weight: float

    def drawn(self, count: int, seed: int, split: Split = "train") -> Tensor:
        """Ids of `count` examples of a split. Raises DeltaflError where there are fewer."""
        size = self.task.size(split)
        if size < count:
            raise DeltaflError(
                f'task "{self.task.name}" has {size} {split} examples, fewer than {count}; '
                "lower --examples"
            )
        generator = keyed_generator(seed, "examples", self.task.name)
        return torch.randperm(size, generator=generator)[:count].sort().values


@dataclass(frozen=True)
class Start:
    """What all clients of a merge begin with.

    mean: the mean of the deltas, by which what is no map moves. dtype: of the arithmetic.
    """

    base: Tensors
    mean: Tensors
    dtype: torch.dtype

    def places(self, net: Net) -> dict[int, str]:
        """Id of each tensor of the net -> its name in the base."""
        held = (*net.module.named_parameters(), *net.module.named_buffers())
        names = net.names_in(self.base)
        return {id(tensor): names[name] for name, tensor in held if name in names}

    def read(self, tensors: Tensors, device: torch.device) -> Read:
        """The tensors of a model, floats in our dtype."""

        def one(name: str) -> Tensor:
            tensor = tensors[name].to(device)
            return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

        return one


def maps_of(start: Start, examples: Examples) -> list[Map]:
    """The maps of a net, as it does two of the examples."""
    net, task = examples.net, examples.task
    batch = task.batch("train", torch.arange(min(2, task.size("train"))), net.device)
    read = start.read(start.base, net.device)
    return find_maps(lambda: task.loss(net, batch), start.places(net), read, start.mean)


class Client:
    """One task of a merge: it answers for map after map with the moments of its examples."""

    def __init__(
        self, examples: Examples, start: Start, rule: LayerRule, maps: Sequence[Map]
    ) -> None:
        net, task = examples.net, examples.task
        self._examples, self._start, self._rule = examples, start, rule
        self._merged: Tensors = {}
        batch = task.batch("train", examples.drawn(rule.examples, rule.seed), net.device)
        self._mask = batch.get("attention_mask")
        reads = {"tuned": start.read(examples.tuned, net.device), "merged": self._read_merged}
        self._passes = {
            side: Pass(
                lambda: task.loss(net, batch),
                start.places(net),
                reads[side],
                maps,
            )
            for side in dict.fromkeys(rule.inputs)
        }

    def _read_merged(self, name: str) -> Tensor:
        start, device = self._start, self._examples.net.device
        if name in self._merged:
            return start.read(self._merged, device)(name)
        tensor = start.read(start.base, device)(name)
        return tensor + start.read(start.mean, device)(name) if name in start.mean else tensor

    def advance(self) -> None:
        """Run to the next map, in each of the models that the rule names."""
        self._given = {side: one.advance() for side, one in self._passes.items()}

    def moments(self, m: Map) -> tuple[Tensor, Tensor, Tensor]:
        """What is sent for the map that the passes have come to: the means over rows of
        (W_t L_t^T + E_t^T) R_t and R_t^T R_t, and W_t.
        """
        matrix = m.matrix(self._examples.tuned).to(self._examples.net.device)
        left, right = (self._given[side] for side in self._rule.inputs)
        shape, error = self._start.base[m.weight].shape, None
        if m.skip and len(self._passes) > 1:
            ours, theirs = (self._passes[side].skips[m.skip] for side in self._rule.inputs)
            error = ours - theirs
        if self._mask is not None and left.shape[:-1] == self._mask.shape:  # padding is no row
            real = self._mask.bool()
            left, right = left[real], right[real]
            error = None if error is None else error[real]
        cross, gram = sums(m, matrix, left, right, shape, error)
        return cross, gram, matrix

    def grams(self, maps: Sequence[Map]) -> Iterator[Tensor]:
        """R_t^T R_t of each map; then it leaves."""
        try:
            for m in maps:
                self.advance()
                yield self.moments(m)[1]
        finally:
            self.leave()

    def take(self, tensors: Tensors) -> None:
        """The merged tensors of the map that was asked for, which is applied next and only once."""
        self._merged = tensors

    def leave(self) -> None:
        """No more maps."""
        for one in self._passes.values():
            one.leave()


@dataclass(frozen=True)
class Statistics:
    """What `deltafl statistics` kept of a fine-tune and its examples: of each map R_t^T R_t, where
    both inputs are the fine-tune's (see `LayerRule`), which it sends as a `Client` would; or of
    each tensor that trains, as if it were a map without bias, its Fisher information.

    files: map -> the file with its tensor alone. tuned, weight: as of `Examples`.
    """

    files: Mapping[Map, Path]
    tuned: Tensors
    weight: float

    def read(self, m: Map) -> Tensor:
        """The tensor of a map, float64."""
        (tensor,) = load_file(self.files[m]).values()
        return tensor.double()

    def advance(self) -> None:
        """Nothing runs."""

    def moments(self, m: Map) -> tuple[Tensor, Tensor, Tensor]:
        """As those of `Client`."""
        matrix, gram = m.matrix(self.tuned), self.read(m)
        return matrix @ gram, gram, matrix

    def take(self, tensors: Tensors) -> None:
        """Nothing depends on what is merged."""

    def leave(self) -> None:
        """Nothing runs."""


def _solved(
    m: Map, clients: Sequence[tuple[float, Client | Statistics]], ridge: float
) -> tuple[Tensor, bool]:
    """What `regressed` makes of the weighed sums of all clients."""
    cross, gram, prior = torch.zeros(()), torch.empty(0), torch.zeros(())
    for p, client in clients:
        ours, square, matrix = client.moments(m)
        gram = gram.add_(square.mul_(p)) if len(gram) else square.mul_(p)  # the largest: in place
        cross, prior = cross + p * ours, prior + p * matrix
    return regressed(cross, gram, prior, ridge)


Evidence: TypeAlias = Examples | Statistics
"""What is known of a fine-tune beside its weights."""


def merge_layerwise(
    rule: LayerRule,
    start: Start,
    evidence: Sequence[Evidence],
    on_progress: OnProgress = ignore,
    state: Path | None = None,
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The merged tensors of every map (see `LayerRule`), in the base's names and the dtype of
    `start`; and what to report: `fallbacks`, weights whose sums were singular, and which are the
    mean; `averaged`, matrices that are no maps; `bytes_up`, `bytes_down` between the server and
    each client, if one runs.

    state: a folder that keeps the maps that are solved; those that it holds already, of a merge of
    the same that was killed, are taken as they are.

    Raises:
        DeltaflError: too few examples, a model that cannot do its task.
    """
    ridge = (1e-2 if rule.examples <= 32 else 1e-4) if rule.ridge is None else rule.ridge
    first = evidence[0]
    maps = [*first.files] if isinstance(first, Statistics) else maps_of(start, first)
    clients = [
        one if isinstance(one, Statistics) else Client(one, start, rule, maps) for one in evidence
    ]
    weighed = [(one.weight, client) for one, client in zip(evidence, clients, strict=True)]
    tensors, fallbacks, up, down = dict[str, Tensor](), list[str](), 0, 0
    try:
        for done, m in enumerate(maps, 1):
            for client in clients:
                client.advance()
            kept = list(state.glob(f"{done:05d}*")) if state else []
            if kept:
                merged, fell_back = load_file(kept[0]), FALLBACK in kept[0].name
            else:
                matrix, fell_back = _solved(m, weighed, ridge)
                made = m.tensors(matrix, start.base)
                merged = {name: tensor.to(start.dtype) for name, tensor in made.items()}
                if state:
                    file = state / f"{done:05d}{FALLBACK * fell_back}.safetensors"
                    write_atomically(file, save(merged))
                    merged = load_file(file)  # which is no memory of ours
            for client in clients:
                client.take(merged)
            tensors |= merged
            fallbacks += [m.weight] * fell_back
            numel = sum(tensor.numel() for tensor in merged.values())
            width = merged[m.weight][0].numel() + bool(m.bias)
            up += 8 * (2 * numel + m.groups * width**2)
            down += start.dtype.itemsize * numel
            on_progress(Progress("layers", done, len(maps)))
    finally:
        for client in clients:
            client.leave()
    averaged = [n for n in start.mean if n not in tensors and len(start.base[n].shape) > 1]
    report: dict[str, object] = {"fallbacks": fallbacks, "averaged": averaged}
    if any(isinstance(client, Client) for client in clients):
        report |= {"bytes_up": up, "bytes_down": down}
    return tensors, report
