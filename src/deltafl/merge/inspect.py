"""How much fine-tunes of one base differ, and what follows from that for merging them."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deltafl.algebra.deltas import Deltas
from deltafl.algebra.streaming import Unit, visit
from deltafl.checkpoints.naming import canonical
from deltafl.merge.inputs import Opened, large_deltas
from deltafl.merge.plan import Plan, read_training
from deltafl.progress import OnProgress, ignore
from deltafl.rules.rule import Source

_LAYER = re.compile(r"^(?:.*?\.)?(?:layers?|blocks?|h|resblocks)\.\d+(?=\.)")


def layer_of(name: str) -> str:
    """The layer of a tensor: `vision_model.encoder.layers.3`, or the first part of its name."""
    found = _LAYER.match(canonical(name))
    return found.group() if found else canonical(name).split(".")[0]


def measure(
    deltas: Deltas, threads: int = 1, on_progress: OnProgress = ignore
) -> dict[str, Tensor]:
    """Layer -> float64 (3, n, n): of every two deltas the product, in how many coordinates both are
    not zero, and in how many of these they have the same sign. One streaming pass.

    Raises:
        DeltaflError: NaN or Inf in a delta.
    """

    def measured(unit: Unit) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, start, stop in unit:
            block = deltas.stack(name, start, stop)
            wide, signs = block.double(), block.sign()
            gram, moved = wide @ wide.T, signs.abs() @ signs.abs().T
            deltas.check_finite(gram, name, start, stop)
            agreeing = (signs @ signs.T + moved) / 2
            part = torch.stack([gram, moved.double(), agreeing.double()]).cpu()
            layer = layer_of(name)
            found[layer] = part + found.get(layer, 0)
        return found

    total: dict[str, Tensor] = {}
    width = 4 * len(deltas.updates)
    for found in visit(
        deltas.specs, measured, threads, name="reading", width=width, on_progress=on_progress
    ):
        for layer, part in found.items():
            total[layer] = part + total.get(layer, 0)
    return total


def cosines(gram: Tensor) -> Tensor:
    """G_ij / sqrt(G_ii G_jj), (n, n); NaN where a delta is zero."""
    lengths = gram.diagonal().sqrt()
    return gram / lengths[:, None] / lengths[None, :]


def inspect_models(plan: Plan, opened: Opened, on_progress: OnProgress = ignore) -> dict[str, Any]:
    """Everything that `deltafl inspect` tells, as plain values."""
    layers = measure(Deltas(opened.updates, opened.weights), plan.threads, on_progress)
    gram, moved, agreeing = torch.stack(list(layers.values())).sum(0)
    names, norms = [s.name for s in plan.sources], gram.diagonal().sqrt().tolist()
    cosine, signs = cosines(gram), agreeing / moved
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


def named_matrix(names: Sequence[str], matrix: Tensor) -> dict[str, Any]:
    """A matrix between models as plain values; None for NaN."""
    rows = [[None if v != v else v for v in row] for row in matrix.tolist()]
    return {"names": list(names), "matrix": rows}


def trainings(plan: Plan, norms: Sequence[float]) -> list[dict[str, Any]]:
    """What is known of each model's training, and the norm of its delta."""
    found = []
    for source, norm in zip(plan.sources, norms, strict=True):
        known = read_training(plan.layouts[source.name])
        facts = {k: known.get(k) for k in ("task", "lr", "epochs", "batch_size", "optimizer")}
        counts = {"num_steps": source.num_steps, "num_examples": source.num_examples}
        found.append({"model": source.name, **facts, **counts, "norm": norm})
    return found


def advise(
    sources: Sequence[Source], norms: Sequence[float], cosine: Tensor, signs: Tensor
) -> Iterator[str]:
    """Plain sentences that follow from the numbers, the most pressing first."""
    n = len(norms)
    if zero := [s.name for s, norm in zip(sources, norms, strict=True) if norm == 0]:
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
            f"Norms differ {spread:.2g}-fold, so {sources[norms.index(max(norms))].name} would "
            "dominate a plain mean: cclip bounds each delta "
            f"(try rho from {min(norms):.3g} to {max(norms):.3g})."
        )
    between = ~torch.eye(n, dtype=torch.bool)
    yield _direction(float(cosine[between].mean()), n)
    if (agreement := float(signs[between].mean())) < 0.55:
        yield (
            f"Two deltas agree in sign on {agreement:.0%} of coordinates, near chance: try fedgma, "
            "median or ties."
        )
    to_others = [float(cosine[i][between[i]].mean()) for i in range(n)]
    odd = to_others.index(min(to_others))
    if n >= 4 and (sum(to_others) - to_others[odd]) / (n - 1) - to_others[odd] > 0.3:
        # krum wants n >= 2f + 3
        robust = "median or multi_krum tolerate" if n >= 5 else "median tolerates"
        yield f"{sources[odd].name} points away from the others: {robust} an outlier."
    yield "These are guesses from geometry; validation data decides: deltafl search."


def _direction(cosine: float, n: int) -> str:
    mean, between = (
        f"(mean cosine {cosine:.2f})",
        f"search scaling_coef between 1/n = {1 / n:.2g} and 1",
    )
    if cosine >= 0.5:
        return f"Deltas point the same way {mean}: their mean is safe, server_lr near 1."
    if cosine <= -0.1:
        return f"Deltas oppose each other {mean}: expect losses from any merge."
    if cosine >= 0.2:
        return f"Deltas share a part of their direction {mean}: {between}."
    return (
        f"Deltas are close to orthogonal {mean}, as usual for different tasks: "
        f"the sum is worth more than the mean; {between}."
    )
