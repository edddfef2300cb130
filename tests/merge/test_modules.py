"""Sequential regression of modules in memory, against the formula in numpy."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deltafl import sequential_regression
from deltafl.errors import DeltaflError
from tiny_models import tiny_llama


def small(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    norm = nn.LayerNorm(5)
    nn.init.normal_(norm.weight)
    return nn.Sequential(nn.Linear(6, 5), norm, nn.Linear(5, 3, bias=False)).double()


def test_every_map_is_asked_for_what_the_fine_tunes_compute() -> None:
    base, tuned = small(0), [small(1), small(2)]
    inputs = [torch.randn(40, 6, dtype=torch.float64) for _ in tuned]
    merged = sequential_regression(base, tuned, inputs, ridge=0.01).apply_to(base)
    torch.testing.assert_close(merged[1].weight, (tuned[0][1].weight + tuned[1][1].weight) / 2)
    left = right = [np.pad(x.numpy(), ((0, 0), (0, 1)), constant_values=1.0) for x in inputs]
    for at in (0, 2):
        cross = gram = prior = 0.0
        for model, ours, theirs in zip(tuned, left, right, strict=True):
            layer = model[at]
            parts = [layer.weight] if layer.bias is None else [layer.weight, layer.bias[:, None]]
            matrix = torch.cat(parts, 1).detach().numpy()
            cross = cross + matrix @ ours.T @ theirs / 80
            gram, prior = gram + theirs.T @ theirs / 80, prior + matrix / 2
        ridge = 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram))
        solved = np.linalg.solve(gram + ridge, (cross + prior @ ridge).T).T
        found = torch.cat([p.view(len(solved), -1) for p in merged[at].parameters()], 1)
        np.testing.assert_allclose(found.detach().numpy(), solved, rtol=1e-9, atol=1e-12)
        left = [m[:2](x).detach().numpy() for m, x in zip(tuned, inputs, strict=True)]
        right = [merged[:2](x).detach().numpy() for x in inputs]


def test_it_takes_tensors_by_keyword_and_leaves_padding_out(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path).module.double()
    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        parameter.data *= 1.1
    rows = {
        "input_ids": torch.randint(3, 20, (12, 7)),
        "attention_mask": (torch.arange(7) < torch.arange(12)[:, None].clamp(min=2)).long(),
    }
    garbage = {**rows, "input_ids": rows["input_ids"].where(rows["attention_mask"] > 0, 2)}
    first, again = (sequential_regression(base, [tuned, base], [rows, r]) for r in (rows, garbage))
    assert (first - again).norm() < 1e-9 * first.norm()


def test_inputs_of_another_number_are_one_line() -> None:
    with pytest.raises(DeltaflError, match="1 inputs for 2 fine-tunes"):
        sequential_regression(small(0), [small(1), small(2)], [torch.randn(9, 6)])
