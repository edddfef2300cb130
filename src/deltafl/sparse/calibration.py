"""Masks from several rounds of scoring."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from deltafl.algebra.tensors import Tensors
from deltafl.errors import DeltaflError, did_you_mean
from deltafl.models.flat import FlatModel
from deltafl.sparse.eligible import Eligible
from deltafl.sparse.masks import MASK_STRATEGIES, Mask, Scope, check_sparsity, select

logger = logging.getLogger(__name__)

KINDS = ("average", "progressive")


def calibrate(
    kind: str,
    rounds: int,
    score: Callable[[int, Mask | None], Tensors],
    *,
    strategy: str,
    sparsity: float,
    scope: Scope,
    eligible: Eligible,
    weights: Tensors,
    generator: torch.Generator,
    attenuate: float | None = None,
    model: FlatModel | None = None,
) -> Mask:
    """One mask from `rounds` calls of `score(round, survivors)`, round = 0 .. rounds - 1.

    average: the float64 mean of the scores, one threshold at the end; survivors is None in every round.
    progressive: after round r (from 1) of R, keep^(r/R) of the eligible coordinates survive, keep = 1 - sparsity;
    survivors (None in the first round) is the mask so far, and only its coordinates can be chosen, so masks are
    nested. With `attenuate` a, rounds after the first score `model` with its dropped weights times a.
    `score` must draw clients, batches and labels anew for each round. A strategy that needs no scores is one call of
    selection and never calls it. The other arguments are `make_mask`'s.

    Raises:
        DeltaflError: unknown kind, rounds < 1, `attenuate` outside [0, 1], without a model or where it does nothing,
            or as `make_mask`.
    """
    if kind not in KINDS:
        raise DeltaflError(f'unknown calibration "{kind}"; {did_you_mean(kind, KINDS)}')
    if rounds < 1:
        raise DeltaflError(f"{rounds} calibration rounds; write at least 1")
    check_sparsity(sparsity)
    needs_scores = MASK_STRATEGIES[strategy].needs_scores
    if attenuate is not None:
        _check_attenuate(attenuate, kind, needs_scores, model)

    def chosen(keep: float, scores: Tensors | None, among: Mask | None) -> Mask:
        return select(
            strategy,
            keep=keep,
            scope=scope,
            eligible=eligible,
            scores=scores,
            weights=weights,
            generator=generator,
            among=among,
        )

    if not needs_scores:
        return chosen(1 - sparsity, None, None)
    if kind == "average":
        return chosen(1 - sparsity, _mean(rounds, score, eligible), None)
    survivors: Mask | None = None
    for r in range(rounds):
        lowered = attenuate is not None and model is not None and survivors is not None
        with attenuated(model, survivors, eligible, attenuate) if lowered else nullcontext():  # type: ignore[arg-type]
            scores = score(r, survivors)
        survivors = chosen((1 - sparsity) ** ((r + 1) / rounds), scores, survivors)
    assert survivors is not None
    return survivors


def _check_attenuate(
    attenuate: float, kind: str, needs_scores: bool, model: FlatModel | None
) -> None:
    if kind != "progressive" or not needs_scores:
        raise DeltaflError("attenuate lowers what progressive scoring dropped; leave it out here")
    if not 0 <= attenuate <= 1:
        raise DeltaflError(
            f"attenuate is {attenuate}, a factor of dropped weights; write a number from 0 to 1"
        )
    if model is None:
        raise DeltaflError("attenuate changes a model's weights for a while; give that model")


def _mean(
    rounds: int, score: Callable[[int, Mask | None], Tensors], eligible: Eligible
) -> dict[str, Tensor]:
    """Scores averaged over rounds, float64; a round that repeats the one before is logged."""
    total: dict[str, Tensor] = {}
    before: list[float] | None = None
    for r in range(rounds):
        scores = score(r, None)
        sums = []
        for name in eligible.shapes:
            values = scores[name].detach().double()
            sums.append(float(values.sum()))
            total[name] = total[name].add_(values) if r else values.clone()
        if sums == before:
            logger.warning(
                "calibration round %d gave the scores of round %d; are clients and data fresh?",
                r,
                r - 1,
            )
        before = sums
    return {name: values.div_(rounds) for name, values in total.items()}


@contextmanager
@torch.no_grad()
def attenuated(
    model: FlatModel, survivors: Mask, eligible: Eligible, factor: float
) -> Iterator[None]:
    """Within the block the eligible coordinates of `model` that do not survive are times `factor`.

    All of `model.flat` is put back bit by bit at the end, also after an error. What was never eligible is not dropped.
    """
    saved = model.flat.detach().clone()
    try:
        for name, tensor in model.tensors().items():
            dropped = ~survivors[name].to(tensor.device)
            part = eligible.of(name)
            if part is not None:
                dropped &= part.to(tensor.device)
            tensor[dropped] *= factor
        with torch.enable_grad():
            yield
    finally:
        model.flat.detach().copy_(saved)
