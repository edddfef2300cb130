"""Task vectors as values: the algebra of arXiv 2212.04089 for use in a notebook."""

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self, TypeAlias, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deltafl.algebra.aggregate import Aggregate, Stepped
from deltafl.algebra.deltas import Deltas, Difference, Update
from deltafl.algebra.reductions import gram_matrix
from deltafl.algebra.tensors import Joined, Lazy, Tensors, lazy
from deltafl.checkpoints.adapter import read_adapter
from deltafl.checkpoints.align import align
from deltafl.checkpoints.checkpoint import (
    Checkpoint,
    entries_of,
    low_rank,
    open_tensors,
    refuse_untied,
)
from deltafl.errors import DeltaflError
from deltafl.rules.building import build_rule
from deltafl.rules.rule import Source
from deltafl.rules.weights import as_weights

logger = logging.getLogger(__name__)

PathLike: TypeAlias = str | os.PathLike[str]
ModelLike: TypeAlias = Tensors | nn.Module | PathLike
M = TypeVar("M", bound=nn.Module)


class TaskVector:
    """delta = tuned - base, a mapping name -> float tensor with the algebra of a vector space.

    `tensors` are in memory, or, from files, read when asked. No operation changes its operands,
    which must hold the same tensors in the same shapes; anything else is an error that names them.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.tensors: Lazy = lazy(tensors)

    @classmethod
    def from_checkpoints(cls, base: ModelLike, finetuned: ModelLike) -> Self:
        """tuned - base in the base's names, in float32, or in float64 where one of them holds that.
        Each: a mapping, a module, a path or a hub id.

        From two files it is read when asked; a model in memory may be trained further, so its
        difference is taken now. Heads and towers that only one of the two has are left out.

        Raises:
            DeltaflError: they differ in anything else.
        """
        ours, theirs = _tensors_of(base), _tensors_of(finetuned)
        adapter = read_adapter(theirs.layout) if isinstance(theirs, Checkpoint) else None
        entries = {"finetuned": adapter.entries if adapter else entries_of(theirs)}
        found = align(entries_of(ours), entries, adapters=entries if adapter else ())
        if found.problems:
            raise DeltaflError(*found.problems)
        refuse_untied(found, ours, {"finetuned": theirs})
        for reason, left in (*found.copied.items(), *found.ignored.get("finetuned", {}).items()):
            logger.info("left out of the task vector: %d tensors (%s)", len(left), reason)
        if adapter:
            specs = {n: lazy(ours).spec(n)._replace(dtype=torch.float32) for n in found.merged}
            return cls(low_rank(adapter, theirs, found.names["finetuned"], specs))
        tuned = Joined({n: (theirs, found.names["finetuned"][n]) for n in found.merged})
        dtypes = {held.spec(n).dtype for n in found.merged for held in (lazy(ours), tuned)}
        delta = Difference(ours, tuned, torch.float64 if torch.float64 in dtypes else torch.float32)
        on_disk = isinstance(ours, Checkpoint) and isinstance(theirs, Checkpoint)
        return cls(delta if on_disk else dict(delta))

    def __add__(self, other: "TaskVector") -> "TaskVector":
        if not isinstance(other, TaskVector):
            return NotImplemented
        _deltas(self, other)
        return TaskVector({name: t + other.tensors[name] for name, t in self.tensors.items()})

    def __radd__(self, other: object) -> "TaskVector":
        # 0 is what `sum` starts with.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: "TaskVector") -> "TaskVector":
        return self + other * -1

    def __neg__(self) -> "TaskVector":
        return self * -1

    def __mul__(self, factor: float) -> "TaskVector":
        return TaskVector({name: t * factor for name, t in self.tensors.items()})

    __rmul__ = __mul__

    def __repr__(self) -> str:
        elements = sum(self.tensors.spec(name).numel for name in self.tensors)
        return f"TaskVector({len(self.tensors)} tensors, {elements:,} elements)"

    def dot(self, other: "TaskVector") -> float:
        """<self, other> over all tensors: float64 in each block, the blocks added with one
        rounding, in any order. Raises DeltaflError on NaN and Inf.
        """
        return float(gram_matrix(_deltas(self, other))[0, 1])

    def norm(self) -> float:
        """The 2-norm over all tensors, in float64."""
        return float(gram_matrix(_deltas(self))) ** 0.5

    def apply_to(
        self, base: M | Tensors | PathLike, scaling_coef: float = 1.0
    ) -> M | dict[str, Tensor]:
        """base + scaling_coef * delta: a new module for a module, else a new dict.

        Rounded once to each base tensor's dtype; tensors that the vector does not hold are the
        base's.
        """
        held = lazy(_tensors_of(base))
        stepped = Stepped(held, self.tensors, scaling_coef)
        for name in self.tensors:
            ours, theirs = self.tensors.spec(name).shape, held.spec(name).shape
            if ours != theirs:
                raise DeltaflError(
                    f'tensor "{name}" is {ours} in the task vector, {theirs} in the base'
                )
        if not isinstance(base, nn.Module):
            return {name: tensor.clone() for name, tensor in stepped.items()}
        applied = copy.deepcopy(base)
        applied.load_state_dict(dict(stepped))
        return applied

    def save(self, path: PathLike) -> None:
        """Write the tensors to one .safetensors file."""
        apart = {n: torch.clone(t.contiguous()) for n, t in self.tensors.items()}
        save_file(apart, path, metadata={"format": "pt"})

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Read what `save` wrote, lazily."""
        return cls(open_tensors(Path(path)))


def _tensors_of(model: ModelLike) -> Tensors:
    if isinstance(model, nn.Module):
        return model.state_dict()
    return model if isinstance(model, Mapping) else open_tensors(model)


def _updates(task_vectors: Sequence[TaskVector], **known: Sequence[int]) -> list[Update]:
    """known: field of `Source` -> a number for each."""
    for numbers in known.values():
        if len(numbers) != len(task_vectors):
            raise DeltaflError(f"{len(numbers)} numbers for {len(task_vectors)} task vectors")
    return [
        Update(v.tensors, Source(f"task vector {i}", **{key: n[i] for key, n in known.items()}))
        for i, v in enumerate(task_vectors)
    ]


def _deltas(*task_vectors: TaskVector) -> Deltas:
    """The vectors, which must hold the same tensors, in float64."""
    return Deltas(_updates(task_vectors), as_weights(None, len(task_vectors)), torch.float64)


def _merged(updates: Sequence[Update], method: str, **params: float | str) -> TaskVector:
    """Any rule, at mean scale. Raises DeltaflError: none to merge, or other tensors in one."""
    return TaskVector(dict(Aggregate(build_rule(method, params), updates)))


def task_arithmetic(task_vectors: Sequence[TaskVector]) -> TaskVector:
    """The mean of the task vectors; times n it is the sum of arXiv 2212.04089."""
    return _merged(_updates(task_vectors), "task_arithmetic")


def fedavg(task_vectors: Sequence[TaskVector], num_examples: Sequence[int]) -> TaskVector:
    """The mean weighted by the number of examples (arXiv 1602.05629)."""
    return _merged(_updates(task_vectors, num_examples=num_examples), "fedavg")


def fednova(task_vectors: Sequence[TaskVector], local_steps: Sequence[int]) -> TaskVector:
    """Each over its local steps: sum_i mean(tau) / (n tau_i) delta_i (arXiv 2007.07481)."""
    return _merged(_updates(task_vectors, num_steps=local_steps), "fednova")


def fedgma(task_vectors: Sequence[TaskVector], rho: float) -> TaskVector:
    """The mean, softened where fewer than a share rho agree in sign (arXiv 2201.11986)."""
    return _merged(_updates(task_vectors), "fedgma", rho=rho)


def median(
    task_vectors: Sequence[TaskVector], middle: Literal["midpoint", "lower"] = "midpoint"
) -> TaskVector:
    """The coordinate-wise median (arXiv 1803.01498)."""
    return _merged(_updates(task_vectors), "median", middle=middle)


def cclip(task_vectors: Sequence[TaskVector], rho: float) -> TaskVector:
    """The mean of the task vectors clipped to norm rho (arXiv 2012.10333)."""
    return _merged(_updates(task_vectors), "cclip", rho=rho)
