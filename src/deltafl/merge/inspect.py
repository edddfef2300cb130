"""How much fine-tunes of one base differ, and what follows from that for merging them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deltafl.algebra.deltas import Deltas
from deltafl.algebra.streaming import Unit, visit
from deltafl.checkpoints.naming import canonical
from deltafl.merge.inputs import Opened, large_deltas
from deltafl.merge.plan import LAYER, Facts, Plan
from deltafl.progress import OnProgress, ignore
from deltafl.rules.rule import Source


def layer_of(name: str) -> str:
    """The layer of a tensor: `vision_model.encoder.layers.3`, or the first part of its name."""
    found = LAYER.match(canonical(name))
    return ".".join(found.groups()) if found else canonical(name).split(".")[0]


def measure(
    deltas: Deltas, threads: int = 1, on_progress: OnProgress = ignore
) -> dict[str, Tensor]:
    """Layer -> float64 (3, n, n): of every two deltas the product, in how many coordinates both are
    not zero, and in how many more of these they have the same sign than in how many they have not.
    One streaming pass.

    Raises:
        DeltaflError: NaN or Inf in a delta.
    """

    def measured(unit: Unit) -> list[tuple[str, Tensor]]:
        found = []
        for name, start, stop in unit:
            block = deltas.stack(name, start, stop)
            signs = block.sign()
            parts = [rows @ rows.T for rows in (block.double(), signs.abs(), signs)]
            found.append((layer_of(name), torch.stack([part.double().cpu() for part in parts])))
            deltas.check_finite(found[-1][1], name, start, stop)
        return found

    layers: dict[str, Tensor] = {}
    width = 4 * len(deltas.updates)
    for found in visit(
        deltas.specs, measured, threads, name="reading", width=width, on_progress=on_progress
    ):
        for layer, part in found:
            layers[layer] = part + layers.get(layer, 0)
    return layers


def cosines(gram: Tensor) -> Tensor:
    """G_ij / sqrt(G_ii G_jj), (n, n); NaN where a delta is zero."""
    lengths = gram.diagonal().sqrt()
    return gram / lengths[:, None] / lengths


def inspect_models(plan: Plan, opened: Opened, on_progress: OnProgress = ignore) -> Facts:
    """Everything that `deltafl inspect` tells, as plain values."""
    deltas = Deltas(opened.updates, opened.weights)
    layers = measure(deltas, plan.threads, on_progress)
    gram, moved, agreeing = torch.stack(list(layers.values())).sum(0)
    names, norms = [s.name for s in plan.sources], gram.diagonal().sqrt().tolist()
    cosine, signs = cosines(gram), (1 + agreeing / moved) / 2
    return {
        "models": names,
        "base": plan.base.ref,
        "tensors": len(plan.alignment.merged),
        "elements": plan.num_elements,
        "norms": dict(zip(names, norms, strict=True)),
        "cosine": named_matrix(names, cosine),
        "sign_agreement": named_matrix(names, signs),
        "layers": {
            name: [[layer, float(sums[0, i, i].sqrt())] for layer, sums in layers.items()]
            for i, name in enumerate(names)
        },
        "training": trainings(plan, norms),
        "notes": [*plan.notes, *large_deltas(opened)],
        "advice": list(advise(plan.sources, norms, cosine, signs)),
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


DIRECTIONS = {
    0.5: "point the same way (mean cosine {:.2f}): their mean is safe, server_lr near 1.",
    0.2: "share a part of their direction (mean cosine {:.2f}): {}.",
    -0.1: "are close to orthogonal (mean cosine {:.2f}), as usual for different tasks: the sum is "
    "worth more than the mean; {}.",
    -1.1: "oppose each other (mean cosine {:.2f}): expect losses from any merge.",
}
"""From which mean cosine on -> what is said of the deltas."""


def advise(
    sources: Sequence[Source], norms: Sequence[float], cosine: Tensor, signs: Tensor
) -> Iterator[str]:
    """Plain sentences that follow from the numbers, the most pressing first."""
    n, names = len(norms), [source.name for source in sources]
    if 0 in norms:
        zero = [name for name, norm in zip(names, norms, strict=True) if norm == 0]
        yield f"{', '.join(zero)}: equal to the base; leave it out."
        return
    if n == 1:
        yield "One model: merging only scales its delta."
        return
    steps, spread = [s.num_steps for s in sources if s.num_steps], max(norms) / min(norms)
    if len(steps) < n:
        yield (
            "Local steps are not known of every model: give them with --num-steps, then fednova "
            "can be tried."
        )
    elif (ratio := max(steps) / min(steps)) >= 2:
        yield (
            f"Local steps differ {ratio:.2g}-fold: fednova weighs each delta by the work behind it."
        )
    if spread >= 2:
        yield (
            f"Norms differ {spread:.2g}-fold, so {names[norms.index(max(norms))]} would dominate a "
            f"plain mean: cclip bounds each delta (try rho from {min(norms):.3g} to "
            f"{max(norms):.3g})."
        )
    mean, agreement = (
        float(m.fill_diagonal_(0).sum()) / (n * n - n) for m in (cosine.clone(), signs.clone())
    )
    said = next(text for least, text in DIRECTIONS.items() if mean >= least)
    between = f"search scaling_coef between 1/n = {1 / n:.2g} and 1"
    yield f"Deltas {said.format(mean, between)}"
    if agreement < 0.55:
        yield (
            f"Two deltas agree in sign on {agreement:.0%} of coordinates, near chance: try fedgma, "
            "median or ties."
        )
    yield "These are guesses from geometry; validation data decides: deltafl search."
