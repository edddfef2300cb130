"""Sequential regression of modules in memory, for use in a notebook."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from deltafl.algebra.aggregate import Stepped
from deltafl.algebra.tensors import Tensors, lazy
from deltafl.errors import DeltaflError
from deltafl.merge.layerwise import Examples, Start, merge_layerwise
from deltafl.merge.task_vector import ModelLike, TaskVector
from deltafl.models.net import Net
from deltafl.rules.sequential_regression import SequentialRegression
from deltafl.tasks import ImageInput
from deltafl.tasks.task import Batch, Device, HeldTask, Model, Split, hash_of


class _Rows(HeldTask):
    """What a module is called with, by keyword, or by position under the name ""; not judged."""

    def size(self, split: Split) -> int:
        return len(next(iter(self.splits[split].values())))

    def batch(
        self,
        split: Split,
        ids: Tensor,
        device: Device = "cpu",
        generator: torch.Generator | None = None,
    ) -> Batch:
        return {name: rows[ids].to(device) for name, rows in self.splits[split].items()}

    def loss(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        model(batch[""]) if "" in batch else model(**batch)
        return torch.zeros(0), torch.zeros(0)

    def score(self, model: Model, batch: Batch) -> Tensor:
        raise DeltaflError("inputs without labels are not judged")

    def fingerprint(self) -> str:
        return hash_of(*self.splits["train"].values())


def sequential_regression(
    base: nn.Module,
    finetuned: Sequence[ModelLike],
    inputs: Sequence[Tensor | Tensors],
    ridge: float | None = None,
) -> TaskVector:
    """One task vector for all: every linear map is asked, on unlabelled inputs of each task, for
    what that fine-tune computes (see `SequentialRegression`). Its scale is 1.

    inputs: for each fine-tune what `base` is called with, a tensor (N, ...), or tensors by keyword;
    `attention_mask`, (N, T), says which rows are padding. As many are used of each as the shortest
    has, all at once.

    Raises:
        DeltaflError: none to merge, other tensors in one, inputs of another number.
    """
    if len(inputs) != len(finetuned) or not finetuned:
        raise DeltaflError(f"{len(inputs)} inputs for {len(finetuned)} fine-tunes")
    vectors = [TaskVector.from_checkpoints(base, one) for one in finetuned]
    mean = sum(vectors[1:], vectors[0]) * (1 / len(vectors))
    net = Net(copy.deepcopy(base).eval(), ImageInput(1))
    held = dict(net.module.state_dict())
    start = Start(held, mean.tensors, next(iter(mean.tensors.values())).dtype)
    all_examples = []
    for one, vector in zip(inputs, vectors, strict=True):
        rows = dict(one) if isinstance(one, Mapping) else {"": one}
        rows = {n: r.to(start.dtype) if r.is_floating_point() else r for n, r in rows.items()}
        tuned = Stepped(lazy(held), vector.tensors, 1.0)
        task = _Rows("inputs", {"train": rows})
        all_examples.append(Examples(net, task, tuned, 1 / len(vectors)))
    count = min(one.task.size("train") for one in all_examples)
    rule = SequentialRegression(examples=count, ridge=ridge)
    merged, _ = merge_layerwise(rule, start, all_examples)
    changed = {n: (t - held[n].double()).to(start.dtype) for n, t in merged.items()}
    return TaskVector({**mean.tensors, **changed})
