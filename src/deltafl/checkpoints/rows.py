"""Tensors with a row for each token, read by the tokens of another vocabulary."""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deltafl.algebra.tensors import BLOCK, Lazy, Spec, Tensors, lazy
from deltafl.checkpoints.vocabulary import Run


class Rows(Lazy):
    """The tensors of model `label`, some with other rows, which may be those of other models.

    models: label -> tensors. places: tensor with other rows -> label -> its name there. runs: what
    those rows are; they follow each other from 0 on.
    """

    def __init__(
        self,
        label: str,
        models: Mapping[str, Tensors],
        places: Mapping[str, Mapping[str, str]],
        runs: Sequence[Run],
    ) -> None:
        self._models = {name: lazy(tensors) for name, tensors in models.items()}
        self._own, self._places, self._runs = self._models[label], places, runs
        self._starts = [run.start for run in runs]
        self._means = dict[str, Tensor]()
        self.names = self._own.names

    def spec(self, name: str) -> Spec:
        spec = self._own.spec(name)
        rows = self._runs[-1].stop
        return spec._replace(shape=(rows, *spec.shape[1:])) if name in self._places else spec

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        if name not in self._places:
            self._own.read(name, start, stop, out)
            return
        width = self._own.spec(name).numel // self._own.spec(name).shape[0]
        first = bisect_right(self._starts, start // width) - 1
        for run in self._runs[first : bisect_left(self._starts, -(-stop // width))]:
            begin, end = max(start, run.start * width), min(stop, run.stop * width)
            out[begin - start : end - start] = self._part(name, run, begin, end, width)

    def _part(self, name: str, run: Run, start: int, stop: int, width: int) -> Tensor:
        """Elements of one run, in float64."""
        if run.sources is None:
            return self._mean(name, width)[torch.arange(start, stop) % width]
        total = torch.zeros(stop - start, dtype=torch.float64)
        for label, row in run.sources:
            there, shift = self._places[name][label], (row - run.start) * width
            part = self._models[label].block(there, start + shift, stop + shift, torch.float64)
            total += part / len(run.sources)
        return total

    def _mean(self, name: str, width: int) -> Tensor:
        """The mean row of those with sources; read once."""
        if name not in self._means:
            total, rows = torch.zeros(width, dtype=torch.float64), 0
            for run in (run for run in self._runs if run.sources is not None):
                for start in range(run.start, run.stop, step := max(1, BLOCK // width)):
                    stop = min(run.stop, start + step)
                    part = self._part(name, run, start * width, stop * width, width)
                    total += part.view(-1, width).sum(0)
                rows += run.stop - run.start
            self._means[name] = total / rows
        return self._means[name]
