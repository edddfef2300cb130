"""Masks from several rounds of scoring."""

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from deltafl.algebra.tensors import Tensors
from deltafl.sparse.eligible import Eligible
from deltafl.sparse.masks import Mask, make_mask
from deltafl.sparse.recipe import SparseRecipe
from deltafl.sparse.strategies import MASK_STRATEGIES

logger = logging.getLogger(__name__)


def calibrate(
    recipe: SparseRecipe,
    score: Callable[[int], Tensors],
    *,
    eligible: Eligible,
    weights: Tensors,
    generator: torch.Generator,
) -> Mask:
    """One mask from `calibration_rounds` calls of `score(round)`, round = 0 .. R - 1.

    average: the float64 mean of the scores, one threshold at the end. progressive: after round r
    (from 1) keep^(r/R) of the eligible coordinates survive, keep = 1 - sparsity_ratio; only
    survivors can be chosen in the next, so masks are nested. `score` must draw clients, batches and
    labels anew for each round; a strategy that reads no scores never calls it.

    Raises:
        DeltaflError: as `make_mask`.
    """
    choose = partial(
        make_mask,
        recipe.mask_strategy,
        scope=recipe.mask_scope,
        eligible=eligible,
        weights=weights,
        generator=generator,
    )
    keep, rounds = 1 - recipe.sparsity_ratio, recipe.calibration_rounds
    if not MASK_STRATEGIES[recipe.mask_strategy].scored:
        return choose(keep=keep, scores=None)
    if recipe.calibration == "average":
        return choose(keep=keep, scores=_mean(rounds, score, eligible))
    survivors: Mask | None = None
    for r in range(rounds):
        survivors = choose(keep=keep ** ((r + 1) / rounds), scores=score(r), among=survivors)
    assert survivors is not None
    return survivors


def _mean(rounds: int, score: Callable[[int], Tensors], eligible: Eligible) -> dict[str, Tensor]:
    """Scores averaged over rounds, float64; a round that repeats the one before is logged."""
    total: dict[str, Tensor] = {}
    before: list[float] = []
    for r in range(rounds):
        scores = score(r)
        values = {name: scores[name].detach().double() for name in eligible.shapes}
        sums = [float(v.sum()) for v in values.values()]
        if sums == before:
            logger.warning(
                "calibration round %d gave the scores of round %d; are clients and data fresh?",
                r,
                r - 1,
            )
        before = sums
        total = {name: total[name] + v if r else v for name, v in values.items()}
    return {name: v / rounds for name, v in total.items()}
