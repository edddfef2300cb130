"""Rules of mergekit by tensor, each against its formula written out in float64 numpy in the space of the weights."""

import math
import os
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint_files import load, succeed
from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.deltas import Update
from deltafl.errors import DeltaflError
from deltafl.rules.arcee_fusion import ArceeFusion
from deltafl.rules.karcher import Karcher
from deltafl.rules.model_stock import ModelStock
from deltafl.rules.multislerp import MultiSlerp
from deltafl.rules.nearswap import NearSwap
from deltafl.rules.nuslerp import NuSlerp
from deltafl.rules.ram import RAM
from deltafl.rules.rule import Rule, Source
from deltafl.rules.sce import SCE
from deltafl.rules.slerp import Slerp
from rules.oracle import models

Formula = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""theta_0, deltas (n, *shape), p (n,) -> R."""


def unit(v: np.ndarray) -> np.ndarray:
    return v / (np.linalg.norm(v) or 1)


def slerped(a: np.ndarray, b: np.ndarray, t: float, straight: float) -> np.ndarray:
    c = np.clip((unit(a) * unit(b)).sum(), -1, 1)
    if abs(c) > straight:
        return (1 - t) * a + t * b
    angle = math.acos(c)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def slerp(t: float) -> Formula:
    return lambda base, deltas, p: slerped(base, base + deltas[0], t, 0.9995) - base


def nuslerp(space: str, per: str) -> Formula:
    def update(base: np.ndarray, deltas: np.ndarray, p: np.ndarray) -> np.ndarray:
        origin = base if space == "weights" else 0 * base
        first, second = np.atleast_1d(*(deltas + origin))
        found = np.empty_like(first)
        places: list[Any] = {
            "tensor": [...],
            "row": list(np.ndindex(first.shape[:-1])),
            "column": [(slice(None), *rest) for rest in np.ndindex(first.shape[1:])],
        }[per]
        for at in places:
            found[at] = slerped(first[at], second[at], p[1], 1 - 1e-15)
        return found.reshape(base.shape) - origin

    return update


def multislerp(space: str) -> Formula:
    """With tangent vectors and the exponential map."""

    def update(base: np.ndarray, deltas: np.ndarray, p: np.ndarray) -> np.ndarray:
        origin = base if space == "weights" else 0 * base
        vs = deltas + origin
        total = np.tensordot(p, np.array([*map(unit, vs)]), 1)
        if np.linalg.norm(total) < 1e-8:
            return np.tensordot(p, vs, 1) - origin
        mean = unit(total)
        tangents = [unit(v) - (unit(v) * mean).sum() * mean for v in vs]
        step = sum(w * t for w, t in zip(p, tangents, strict=True))
        size = np.linalg.norm(step)
        moved = math.cos(size) * mean + math.sin(size) * step / (size or 1)
        return moved * (p @ [np.linalg.norm(v) for v in vs]) - origin

    return update


def karcher(base: np.ndarray, deltas: np.ndarray, p: np.ndarray) -> np.ndarray:
    vs = base + deltas
    total = np.tensordot(p, np.array([*map(unit, vs)]), 1)
    if np.linalg.norm(total) < 1e-5:
        return np.tensordot(p, deltas, 1)
    mean = unit(total)
    for _ in range(10):
        step = 0 * mean
        for w, v in zip(p, vs, strict=True):
            c = np.clip((unit(v) * mean).sum(), -1, 1)
            if math.sin(math.acos(c)) >= 1e-5:
                step = step + w * math.acos(c) / math.sin(math.acos(c)) * (unit(v) - c * mean)
        size = np.linalg.norm(step)
        if size < 1e-5:
            break
        mean = math.cos(size) * mean + math.sin(size) * step / size
    return (p @ [np.linalg.norm(v) for v in vs]) * mean - base


def stock(rows: bool) -> Formula:
    def of(vectors: np.ndarray, p: np.ndarray) -> np.ndarray:
        n = len(vectors)
        pairs = [(i, j) for i in range(n) for j in range(i)]
        c = np.mean([(unit(vectors[i]) * unit(vectors[j])).sum() for i, j in pairs])
        t = 0 if abs(1 + (n - 1) * c) < 1e-6 else n * c / (1 + (n - 1) * c)
        return t * np.tensordot(p, vectors, 1)

    def update(base: np.ndarray, deltas: np.ndarray, p: np.ndarray) -> np.ndarray:
        if not rows or base.ndim < 2:
            return of(deltas, p)
        found = np.empty_like(base)
        for at in np.ndindex(base.shape[:-1]):
            found[at] = of(deltas[(slice(None), *at)], p)
        return found

    return update


def swapped(t: float) -> Formula:
    def update(base: np.ndarray, deltas: np.ndarray, p: np.ndarray) -> np.ndarray:
        weight = np.clip(t / np.abs(deltas[0]).clip(1e-6), 0, 1)
        return weight * (base + deltas[0]) + (1 - weight) * base - base

    return update


def fused(base: np.ndarray, deltas: np.ndarray, p: np.ndarray) -> np.ndarray:
    rows = np.atleast_1d(base), np.atleast_1d(base + deltas[0])
    new, old = rows[1], rows[0]
    a, b = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) + 1e-8 for x in (new, old))
    scores = np.abs(new - old) * (a * np.log(a / b)).sum(-1, keepdims=True)
    q = [np.sort(scores.ravel())[int(share * (scores.size - 1))] for share in (0.25, 0.5, 0.75)]
    kept = scores >= q[1] + 1.5 * (q[2] - q[0])
    return np.where(kept, new - old, 0).reshape(base.shape)


def selected(topk: float) -> Formula:
    def update(base: np.ndarray, deltas: np.ndarray, p: np.ndarray) -> np.ndarray:
        masked = deltas.copy()
        if topk < 1:
            spread = deltas.var(0).ravel()
            k = int(topk * np.count_nonzero(spread))
            masked[
                :,
                ~np.isin(np.arange(spread.size), np.argsort(-spread, kind="stable")[:k]).reshape(
                    base.shape
                ),
            ] = 0
        sign = np.where(np.tensordot(p, masked, 1) >= 0, 1, -1)
        energy = np.array([(d**2).mean() for d in masked])
        w = p * (energy if energy.sum() >= 1e-6 else 1)
        w = w / w.sum()
        agree = np.sign(masked) == sign
        weights = w.reshape(-1, *[1] * base.ndim) * agree
        return (weights * masked).sum(0) / weights.sum(0).clip(1e-6)

    return update


def moving(epsilon: float) -> Formula:
    def update(base: np.ndarray, deltas: np.ndarray, p: np.ndarray) -> np.ndarray:
        moved = (np.abs(deltas) > epsilon) * p.reshape(-1, *[1] * base.ndim)
        return (moved * deltas).sum(0) / np.where(moved.any(0), moved.sum(0), 1)

    return update


def merge(rule: Rule, base: dict, deltas: Sequence[dict], weights: Any = None) -> dict:
    """R through the engine in float64."""
    updates = [
        Update({k: torch.tensor(v) for k, v in d.items()}, Source(f"m{i}"))
        for i, d in enumerate(deltas)
    ]
    held = {k: torch.tensor(v) for k, v in base.items()}
    result = Aggregate(rule, updates, weights, base=held, dtype=torch.float64)
    return {k: v.numpy() for k, v in result.items()}


CASES: list[tuple[Rule, Formula]] = [
    *((Slerp(t), slerp(t)) for t in (0.0, 0.3, 1.0, 1.5)),
    *((NuSlerp(s, per), nuslerp(s, per)) for s in ("deltas", "weights") for per in ("tensor", "row", "column")),
    *((MultiSlerp(s), multislerp(s)) for s in ("deltas", "weights")),
    (Karcher(), karcher),
    (ModelStock(), stock(False)),
    (ModelStock(filter_wise=True), stock(True)),
    (NearSwap(0.2), swapped(0.2)),
    (ArceeFusion(), fused),
    *((SCE(topk), selected(topk)) for topk in (0.0, 0.3, 1.0)),
    *((RAM(epsilon), moving(epsilon)) for epsilon in (1e-5, 0.5)),
]  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 2**-12], ids=["large", "small"])
@pytest.mark.parametrize("kind", ["normal", "equal", "zero"])
@pytest.mark.parametrize(
    ("rule", "formula"), CASES, ids=lambda x: repr(x) if isinstance(x, Rule) else ""
)
def test_a_rule_is_its_formula(rule: Rule, formula: Formula, kind: str, scale: float):
    base, *deltas = models(1, seed=9) + models(rule.num_models or 4, kind)
    deltas = [{k: scale * v for k, v in d.items()} for d in deltas]
    for weights in (None, [1.0, 2.0, 0.5, 1.5][: len(deltas)]):
        p = np.array(weights or [1.0] * len(deltas))
        for name, found in merge(rule, base, deltas, weights).items():
            wanted = formula(base[name], np.array([d[name] for d in deltas]), p / p.sum())
            assert np.isfinite(found).all()
            np.testing.assert_allclose(found, wanted, atol=1e-9 * scale, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("rule", [Karcher(), Slerp(0.5), MultiSlerp("weights")], ids=repr)
def test_whole_weights_need_their_base_and_weights_that_are_not_negative(rule: Rule):
    base, delta = models(2)
    updates = [Update({k: torch.tensor(v) for k, v in delta.items()}, Source("m"))]
    for held, line in (({}, "tall"), ({"tall": base["tall"]}, "wide")):
        with pytest.raises(
            DeltaflError, match=f'{rule.name} merges whole weights.* lacks "{line}"'
        ):
            Aggregate(rule, updates, base={k: torch.tensor(v) for k, v in held.items()})
    with pytest.raises(DeltaflError, match="a model's weight must not be negative"):
        merge(rule, base, [delta], [-1.0])


def test_t_by_tensor():
    base, delta = models(2)
    found = merge(Slerp({"ta*": [0.0], "*": [1.0]}), base, [delta])
    for name, wanted in delta.items():
        np.testing.assert_allclose(
            found[name], 0 if name in ("tall", "table") else wanted, atol=1e-12
        )


@dataclass(frozen=True)
class Same:
    """The same merge in mergekit's words and in ours."""

    method: str
    parameters: dict[str, Any]
    ours: tuple[object, ...]
    models: tuple[str, ...] = ("m0", "m1", "m2")
    base: str | None = "base"
    weights: tuple[float, ...] = ()

    def config(self) -> dict[str, Any]:
        weights = [{"parameters": {"weight": weight}} for weight in self.weights]
        named = [
            {"model": name, **weight}
            for name, weight in zip_longest(self.models, weights, fillvalue={})
        ]
        config = {"merge_method": self.method, "models": named, "parameters": self.parameters}
        return config | ({"base_model": self.base} if self.base else {})


PAIR, ONE = ("m0", "m2"), ("m1",)
SAME = [
    Same("slerp", {"t": 0.3}, ("slerp", "--t", 0.3), ONE),
    Same("nuslerp", {}, ("nuslerp", "--weights", 1, 2), PAIR, weights=(1, 2)),
    Same("nuslerp", {"nuslerp_flatten": False}, ("nuslerp", "--per", "row"), PAIR, weights=(1, 1)),
    Same("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, ("nuslerp", "--per", "column"), PAIR,
         weights=(1, 1)),
    Same("nuslerp", {}, ("nuslerp", "--space", "weights", "--weights", 1, 2), PAIR, None, (1, 2)),
    Same("multislerp", {}, ("multislerp", "--weights", 1, 2, 1), weights=(1, 2, 1)),
    Same("multislerp", {}, ("multislerp", "--space", "weights"), base=None, weights=(1, 1, 1)),
    Same("karcher", {}, ("karcher",), base=None),
    Same("model_stock", {}, ("model_stock",)),
    Same("model_stock", {"filter_wise": True}, ("model_stock", "--filter-wise")),
    Same("nearswap", {"t": 0.05}, ("nearswap", "--t", 0.05), ONE),
    Same("arcee_fusion", {}, ("arcee_fusion",), ONE),
    Same("sce", {"select_topk": 0.4}, ("sce", "--select-topk", 0.4)),
    Same("breadcrumbs", {"density": 0.6, "gamma": 0.1},
         ("breadcrumbs", "--density", 0.6, "--gamma", 0.1, "--scaling-coef", 1), weights=(1, 1, 1)),
    Same("breadcrumbs_ties", {"density": 0.6, "gamma": 0.1},
         ("breadcrumbs", "--density", 0.6, "--gamma", 0.1, "--inner", "elect", "--merge", "sum", "--zero-sum",
          "positive", "--scaling-coef", 1), weights=(1, 1, 1)),
    Same("della", {"density": 1.0}, ("della", "--density", 1, "--zero-sum", "positive", "--inner", "elect"),
         weights=(1, 1, 1)),
    Same("ram", {"epsilon": 0.1}, ("ram", "--epsilon", 0.1)),
]  # fmt: skip
PEER = os.environ.get("DELTAFL_MERGEKIT")
script = runpy.run_path(
    str(Path(__file__).parents[2] / "benchmarks" / "mergekit_reference.py"), run_name="script"
)


@pytest.mark.peer
@pytest.mark.skipif(PEER is None, reason="DELTAFL_MERGEKIT is not set to a mergekit-yaml program")
@pytest.mark.parametrize("same", SAME, ids=lambda same: " ".join(map(str, same.ours)))
def test_mergekit_itself_agrees(same: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    script["write_models"](tmp_path, script["inputs"]())
    method, *options = same.ours
    args = ("--base", "base", "--models", *same.models, "--out", "out", "--method", method)
    succeed("merge", *args, *options)
    wanted = script["merged"](PEER, tmp_path, same.config())
    for name, found in load(tmp_path / "out").items():
        np.testing.assert_allclose(found.numpy(), wanted[name], rtol=1e-5, atol=2e-6, err_msg=name)
