"""How much fine-tunes of one base differ, and what follows from that for merging them."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from math import nan
from pathlib import Path

import torch
from torch import Tensor

from deltafl.algebra.deltas import Deltas
from deltafl.algebra.streaming import Unit, visit
from deltafl.checkpoints.naming import canonical
from deltafl.checkpoints.stack import LAYER
from deltafl.merge.inputs import Opened, large_deltas
from deltafl.merge.plan import Facts, Plan
from deltafl.progress import OnProgress, ignore
from deltafl.rules.matrices import is_matrix, triples
from deltafl.rules.rule import Source
from deltafl.seeding import keyed_generator

LEADING = 32
"""Most directions of a matrix that are compared."""

EXACT = 256
"""Up to this smaller side of a matrix its directions are found exactly."""


def layer_of(name: str) -> str:
    """The layer of a tensor: `vision_model.encoder.layers.3`, or the first part of its name."""
    found = LAYER.match(canonical(name))
    return ".".join(found.groups()) if found else canonical(name).split(".")[0]


def measure(
    deltas: Deltas, threads: int = 1, on_progress: OnProgress = ignore
) -> dict[str, Tensor]:
    """Layer -> float64 (5, n, n): of every two deltas the product, in how many coordinates both are
    not zero, in how many more of these they have the same sign than in how many they have not, and
    `shared` of the directions of its matrices. One pass; one delta of a matrix is in memory.

    Raises:
        DeltaflError: NaN or Inf in a delta.
    """
    models = range(len(deltas.updates))

    def measured(unit: Unit) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, start, stop in unit:
            block = deltas.stack(name, start, stop)
            signs = block.sign()
            rows = block.double(), signs.abs(), signs
            sums = torch.stack([(row @ row.T).double().cpu() for row in rows])
            deltas.check_finite(sums, name, start, stop)
            spec, spaces = deltas.specs[name], torch.zeros_like(sums[:2])
            if len(models) > 1 and stop == spec.numel and is_matrix(spec.shape):
                spaces = shared([directions(deltas, name, model) for model in models])
            layer = layer_of(name)
            found[layer] = torch.cat([sums, spaces]) + found.get(layer, 0)
        return found

    layers: dict[str, Tensor] = {}
    for found in visit(
        deltas.specs,
        measured,
        threads,
        whole=True,
        name="reading",
        width=4 * len(models),
        on_progress=on_progress,
    ):
        for layer, part in found.items():
            layers[layer] = part + layers.get(layer, 0)
    return layers


def directions(deltas: Deltas, name: str, model: int) -> Tensor:
    """The k leading right singular vectors, (in, k) float64, of one delta of a matrix (out, in).

    k = min(out, in) / n as tsv_m keeps, within 1 and `LEADING`, or the rank if that is less. Those
    of large matrices are found among k + 16 combinations of rows, drawn at random, after one step
    of power iteration (arXiv 0909.4061).
    """
    spec = deltas.specs[name]
    matrix = deltas.stack(name, 0, spec.numel, [model]).view(spec.shape).flatten(1)
    least = min(matrix.shape)
    rank = min(LEADING, max(1, least // len(deltas.updates)))
    if least <= EXACT:
        return triples(matrix.double(), rank)[2]
    generator = keyed_generator("directions", name, model)
    start = torch.randn(matrix.shape[1], rank + 16, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix.mT @ (matrix @ start)).Q
    return basis.double() @ triples((matrix @ basis).double(), rank)[2]


def shared(bases: Sequence[Tensor]) -> Tensor:
    """Of every two V_i, (in, k_i), ||V_i^T V_j||^2, and its mean over random directions,
    k_i k_j / in. (2, n, n) float64.
    """
    squares = torch.stack([(a.mT @ b).square().sum() for a in bases for b in bases])
    gram = squares.view(len(bases), -1).cpu()
    ranks = gram.diagonal()
    return torch.stack([gram, ranks.outer(ranks) / len(bases[0])])


def cosines(gram: Tensor, products: Tensor | None = None) -> Tensor:
    """P_ij / sqrt(G_ii G_jj), (.., n, n), P = G unless given; NaN where a delta is zero."""
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    products = gram if products is None else products
    return products / lengths[..., None] / lengths[..., None, :]


def mean(pairs: Tensor) -> Tensor:
    """(.., n, n) -> (..): over pairs of different models, without NaN."""
    return (pairs + torch.full(pairs.shape[-1:], nan).diag()).nanmean((-2, -1))


def inspect_models(plan: Plan, opened: Opened, on_progress: OnProgress = ignore) -> Facts:
    """Everything that `deltafl inspect` tells, as plain values."""
    layers = measure(Deltas(opened.updates, opened.weights), plan.threads, on_progress)
    sums = torch.stack([*layers.values()], 1)
    gram, moved, agreeing, common, random = sums.sum(1)
    names, norms = [s.name for s in plan.sources], gram.diagonal().sqrt().tolist()
    pairs = {
        "cosine": cosines(gram),
        "sign_agreement": (1 + agreeing / moved) / 2,
        "overlap": cosines(common),
        "chance": cosines(common, random),
    }
    means = (mean(cosines(sums[3], part)).tolist() for part in sums[3:])
    rows = zip(layers, *means, strict=True)
    by_layer = {layer: pair for layer, *pair in rows if pair[0] == pair[0]}
    return {
        "models": names,
        "base": plan.base.ref,
        "tensors": len(plan.alignment.merged),
        "elements": plan.num_elements,
        "norms": dict(zip(names, norms, strict=True)),
        **{key: named_matrix(names, matrix) for key, matrix in pairs.items()},
        "layers": {
            name: [[layer, float(sums[0, i, i].sqrt())] for layer, sums in layers.items()]
            for i, name in enumerate(names)
        },
        "overlap_layers": by_layer,
        "training": trainings(plan, norms),
        "notes": [*plan.notes, *large_deltas(opened)],
        "advice": list(advise(plan.sources, norms, pairs, by_layer)),
    }


def named_matrix(names: Sequence[str], matrix: Tensor) -> Facts:
    """A matrix between models as plain values; None for NaN."""
    rows = [[None if v != v else v for v in row] for row in matrix.tolist()]
    return {"names": list(names), "matrix": rows}


def trainings(plan: Plan, norms: Sequence[float]) -> list[Facts]:
    """What is known of each model's training, and the norm of its delta."""
    facts = {"task", "lr", "epochs", "batch_size", "optimizer"}
    return [
        {"model": source.name, **plan.training[source.name].model_dump(include=facts)}
        | {"num_steps": source.num_steps, "num_examples": source.num_examples, "norm": norm}
        for source, norm in zip(plan.sources, norms, strict=True)
    ]


_TABLE = Path(__file__).with_name("advice.toml").read_text("utf-8")
ADVICE = tomllib.loads(_TABLE)["advice"]
"""Measure, least, below and what is said of a measure in [least, below)."""


def advise(
    sources: Sequence[Source],
    norms: Sequence[float],
    pairs: Mapping[str, Tensor],
    by_layer: Mapping[str, list[float]],
) -> Iterator[str]:
    """The sentences of `ADVICE` that suit the measures.

    pairs: cosine, sign_agreement, overlap and chance, (n, n). by_layer: mean overlap and chance.
    """
    n = len(norms)
    if 0 in norms:
        zero = [source.name for source, norm in zip(sources, norms, strict=True) if norm == 0]
        yield f"{', '.join(zero)}: equal to the base; leave it out."
        return
    if n == 1:
        yield "One model: merging only scales its delta."
        return
    steps = [source.num_steps for source in sources if source.num_steps]
    low, high = min(norms), max(norms)
    numbers = {
        **{name: float(mean(matrix)) for name, matrix in pairs.items()},
        "models": n,
        "unknown": n - len(steps),
        "steps": max(steps, default=nan) / min(steps, default=nan),
        "norms": high / low,
        "low": low,
        "high": high,
    }
    numbers["excess"] = numbers["overlap"] - numbers["chance"]
    longest = sources[norms.index(high)].name
    layer, peak = max(by_layer.items(), key=lambda item: item[1], default=("", [nan]))
    for measure, least, below, text in ADVICE:
        if least <= numbers[measure] < below:
            yield text.format(**numbers, longest=longest, layer=layer, peak=peak[0])
