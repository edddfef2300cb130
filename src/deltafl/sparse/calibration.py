"""Masks from several rounds of scoring."""

from collections.abc import Callable
from functools import partial

import torch

from deltafl.algebra.tensors import Tensors
from deltafl.sparse.masks import Mask, choose_mask
from deltafl.sparse.recipe import SparseRecipe


def calibrate(
    recipe: SparseRecipe,
    score: Callable[[int], Tensors],
    weights: Tensors,
    able: Mask,
    generator: torch.Generator,
) -> Mask:
    """One mask from `calibration_rounds` calls of `score(round)`, round = 0 .. R - 1.

    average: the float64 mean of the scores, one threshold at the end. progressive: after round r
    (from 1) keep^(r/R) of the eligible coordinates survive, keep = 1 - sparsity_ratio; only
    survivors can be chosen in the next, so masks are nested. `score` must draw clients, batches and
    labels anew for each round; a strategy that reads no scores never calls it.

    Raises:
        DeltaflError: as `choose_mask`.
    """
    choose = partial(
        choose_mask, recipe.mask_strategy, able=able, scope=recipe.mask_scope, generator=generator
    )
    keep, rounds = 1 - recipe.sparsity_ratio, recipe.calibration_rounds
    if not recipe.is_calibrated:
        return choose(weights, keep=keep)
    if recipe.calibration == "progressive":
        mask = able
        for r in range(1, rounds + 1):
            mask = choose(score(r - 1), keep=keep ** (r / rounds), among=mask)
        return mask
    mean = {name: torch.zeros_like(part, dtype=torch.float64) for name, part in able.items()}
    for r in range(rounds):
        scores = score(r)
        mean = {n: (total + scores[n].detach().cpu().double()) for n, total in mean.items()}
    return choose({n: total / rounds for n, total in mean.items()}, keep=keep)
