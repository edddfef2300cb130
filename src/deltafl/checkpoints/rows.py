"""Tensors with a row for each token, read by the tokens of another vocabulary."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deltafl.algebra.tensors import Lazy, Spec, Tensors, lazy
from deltafl.checkpoints.vocabulary import Sources


class Rows(Lazy):
    """Those tensors of model `label`, with these rows, its own or others'.

    models: label -> tensors. names: name here -> label -> name there. rows: of None, a padding,
    the row is the mean of all that are not.
    """

    def __init__(
        self,
        label: str,
        models: Mapping[str, Tensors],
        names: Mapping[str, Mapping[str, str]],
        rows: Sequence[Sources | None],
    ) -> None:
        self.names = self._places = names
        self._label, self._models, self._rows = label, models, rows
        self._means = dict[str, Tensor]()

    def spec(self, name: str) -> Spec:
        spec = lazy(self._models[self._label]).spec(self._places[name][self._label])
        return spec._replace(shape=(len(self._rows), *spec.shape[1:]))

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        width = math.prod(self.spec(name).shape[1:])
        first, last = start // width, -(-stop // width)
        found = torch.zeros(last - first, width, dtype=torch.float64)
        for row, sources in zip(found.unbind(), self._rows[first:last], strict=True):
            if sources is None:
                row += self._mean(name, width)
            else:
                self._add(name, row, sources)
        out.copy_(found.view(-1)[start - first * width :][: stop - start])

    def _add(self, name: str, row: Tensor, sources: Sources) -> None:
        """Add the mean of rows to one, (width,)."""
        for label, at in sources:
            there, start = self._places[name][label], at * len(row)
            part = lazy(self._models[label]).block(there, start, start + len(row))
            row.add_(part, alpha=1 / len(sources))

    def _mean(self, name: str, width: int) -> Tensor:
        if name not in self._means:
            known = [sources for sources in self._rows if sources is not None]
            mean = torch.zeros(width, dtype=torch.float64)
            for sources in known:
                self._add(name, mean, sources)
            self._means[name] = mean / len(known)
        return self._means[name]
