"""How much fine-tunes of one base differ: norms, cosines, sign agreement, per layer, and what follows for merging."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

LAYER = re.compile(r"^(?:.*?\.)?(?:layers?|blocks?|h|resblocks)\.\d+(?=\.)")


@dataclass(frozen=True)
class Geometry:
    """Of n deltas: `gram` of each layer, layer -> (n, n) float64, and the counts of coordinates, (n, n) float64, in
    which both are not zero (`moved`) and in which both also have the same sign (`agreeing`).
    """

    gram: Mapping[str, Tensor]
    moved: Tensor
    agreeing: Tensor

    @property
    def total(self) -> Tensor:
        """The Gram matrix over all layers."""
        return torch.stack(list(self.gram.values())).sum(0)


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to: `vision_model.encoder.layers.3`, or the first part of its name."""
    found = LAYER.match(canonical(name))
    return found.group() if found else canonical(name).split(".")[0]


def measure(deltas: Deltas, threads: int = 1, on_progress: OnProgress = ignore) -> Geometry:
    """One streaming pass over all deltas. Raises DeltaflError on NaN and Inf."""
    n = len(deltas.updates)

    def partial(unit: Unit) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        gram: dict[str, Tensor] = {}
        moved, agreeing = (
            torch.zeros(n, n, dtype=torch.float64),
            torch.zeros(n, n, dtype=torch.float64),
        )
        for name, start, stop in unit:
            block = deltas.stack(name, start, stop)
            signs = block.sign()
            wide = block.double()
            part = (wide @ wide.T).cpu()
            if not torch.isfinite(part).all():
                deltas.refuse_nonfinite(name, start, stop)
            layer = layer_of(name)
            gram[layer] = gram[layer] + part if layer in gram else part
            product, both = (
                (signs @ signs.T).double().cpu(),
                (signs.abs() @ signs.abs().T).double().cpu(),
            )
            moved += both
            agreeing += (product + both) / 2
        return gram, moved, agreeing

    passed = visit(
        deltas.specs, partial, threads, name="reading", width=4 * n, on_progress=on_progress
    )
    total: dict[str, Tensor] = {}
    moved, agreeing = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for _, (gram, more, same) in passed:
        for layer, part in gram.items():
            total[layer] = total[layer] + part if layer in total else part
        moved += more
        agreeing += same
    return Geometry(total, moved, agreeing)


def cosines(gram: Tensor) -> Tensor:
    """G_ij / sqrt(G_ii G_jj), (n, n); NaN where a delta is zero."""
    lengths = gram.diagonal().sqrt()
    return gram / lengths[:, None] / lengths[None, :]


def inspect_models(plan: Plan, opened: Opened, on_progress: OnProgress = ignore) -> dict[str, Any]:
    """Everything that `deltafl inspect` tells, as plain values."""
    geometry = measure(Deltas(opened.updates, opened.weights), plan.threads, on_progress)
    gram = geometry.total
    names = [s.name for s in plan.sources]
    norms = gram.diagonal().sqrt().tolist()
    cosine = cosines(gram)
    signs = geometry.agreeing / geometry.moved
    training = [
        _training(s, norm, read_training(plan.layouts[s.name]))
        for s, norm in zip(plan.sources, norms, strict=True)
    ]
    return {
        "models": names,
        "base": plan.base.ref,
        "tensors": len(plan.alignment.merged),
        "elements": plan.num_elements,
        "norms": dict(zip(names, norms, strict=True)),
        "cosine": {"names": names, "matrix": _plain(cosine)},
        "sign_agreement": {"names": names, "matrix": _plain(signs)},
        "layers": {
            name: [[layer, float(g[i, i].sqrt())] for layer, g in geometry.gram.items()]
            for i, name in enumerate(names)
        },
        "training": training,
        "notes": [*plan.notes, *large_deltas(opened)],
        "advice": advise(plan.sources, norms, cosine, signs),
    }


def _plain(matrix: Tensor) -> list[list[float | None]]:
    return [[None if v != v else v for v in row] for row in matrix.tolist()]


def _training(source: Source, norm: float, known: Mapping[str, Any]) -> dict[str, Any]:
    facts = {k: known.get(k) for k in ("task", "lr", "epochs", "batch_size", "optimizer")}
    return {
        "model": source.name,
        **facts,
        "num_steps": source.num_steps,
        "num_examples": source.num_examples,
        "norm": norm,
    }


def advise(
    sources: Sequence[Source], norms: Sequence[float], cosine: Tensor, signs: Tensor
) -> list[str]:
    """Plain sentences that follow from the numbers, the most pressing first."""
    n = len(norms)
    zero = [s.name for s, norm in zip(sources, norms, strict=True) if norm == 0]
    if zero:
        return [f"{', '.join(zero)}: equal to the base; leave it out."]
    if n == 1:
        return ["One model: merging only scales its delta."]
    said = []
    steps = [s.num_steps for s in sources if s.num_steps]
    spread, worked = max(norms) / min(norms), max(steps) / min(steps) if len(steps) == n else None
    if worked is not None and worked >= 2:
        said.append(
            f"Local steps differ {worked:.2g}-fold: fednova weighs each delta by the work behind it."
        )
    elif worked is None:
        said.append(
            "Local steps are not known of every model: give them with --num-steps, then fednova can be tried."
        )
    if spread >= 2:
        largest = sources[max(range(n), key=lambda i: norms[i])].name
        said.append(
            f"Norms differ {spread:.2g}-fold, so {largest} would dominate a plain mean: cclip bounds each delta "
            f"(try rho from {min(norms):.3g} to {max(norms):.3g})."
        )
    off = ~torch.eye(n, dtype=torch.bool)
    mean_cosine, agreement = float(cosine[off].mean()), float(signs[off].mean())
    if mean_cosine >= 0.5:
        said.append(
            f"Deltas point the same way (mean cosine {mean_cosine:.2f}): their mean is safe, server_lr near 1."
        )
    elif mean_cosine <= -0.1:
        said.append(
            f"Deltas oppose each other (mean cosine {mean_cosine:.2f}): expect losses from any merge."
        )
    elif mean_cosine >= 0.2:
        said.append(
            f"Deltas share a part of their direction (mean cosine {mean_cosine:.2f}): "
            f"search scaling_coef between 1/n = {1 / n:.2g} and 1."
        )
    else:
        said.append(
            f"Deltas are close to orthogonal (mean cosine {mean_cosine:.2f}), as usual for different tasks: "
            f"the sum is worth more than the mean; search scaling_coef between 1/n = {1 / n:.2g} and 1."
        )
    if agreement < 0.55:
        said.append(
            f"Two deltas agree in sign on {agreement:.0%} of coordinates, near chance: try fedgma, median or ties."
        )
    if n >= 4:
        apart = [float(cosine[i][off[i]].mean()) for i in range(n)]
        odd = min(range(n), key=lambda i: apart[i])
        rest = sum(apart[i] for i in range(n) if i != odd) / (n - 1)
        if rest - apart[odd] > 0.3:
            robust = (
                "median or multi_krum tolerate" if n >= 5 else "median tolerates"
            )  # krum wants n >= 2f + 3
            said.append(f"{sources[odd].name} points away from the others: {robust} an outlier.")
    return [*said, "These are guesses from geometry; validation data decides: deltafl search."]
