"""Masks: which coordinates train. True = trainable; `sparsity` is the frozen fraction."""

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from deltafl.algebra.tensors import Tensors
from deltafl.errors import DeltaflError
from deltafl.files import write_atomically
from deltafl.models.net import Net
from deltafl.sparse.eligible import eligible, trained
from deltafl.sparse.recipe import Scope, SparseRecipe
from deltafl.sparse.strategies import MASK_STRATEGIES
from deltafl.tasks.task import hash_of

Mask: TypeAlias = Mapping[str, Tensor]
"""Name -> bool in the tensor's shape, True = trainable, for every trained tensor of a net."""

FORMAT = "mask 1"


def choose_mask(
    strategy: str,
    values: Tensors,
    able: Mask,
    *,
    keep: float,
    scope: Scope,
    generator: torch.Generator,
    among: Mask | None = None,
) -> Mask:
    """Keep exactly k = round(keep * n) of n eligible coordinates, those that `strategy` prefers.

    global: n and k over all tensors at once. per_layer: n and k for each tensor by itself, so that
    the sum differs from the global k by up to half a coordinate a tensor. Equal keys at the
    threshold are drawn by a permutation from `generator` (on the CPU). values: the scores or the
    weights of every tensor of `able`, as the strategy asks; the mask is on the device of each.
    among: choose only what this mask keeps; n is the same. Selection is exact for any number of
    elements.

    Raises:
        DeltaflError: values that are NaN, or nothing kept.
    """
    chosen = MASK_STRATEGIES[strategy]
    free = able if among is None else among
    mask = {n: free[n].to(values[n].device, copy=True) for n in able}
    keys: dict[str, Tensor] = {}
    for name, kept in mask.items():
        value = values[name].detach()
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        keys[name] = chosen.keys(value)[kept]
        if keys[name].isnan().any():
            raise DeltaflError(
                f'{"scores" if chosen.scored else "weights"} of "{name}" hold NaN; was the model '
                "trained to divergence?"
            )
    counts = {name: int(allowed.sum()) for name, allowed in able.items()}
    total = 0
    for group in [list(mask)] if scope == "global" else [[name] for name in mask]:
        k = round(keep * sum(counts[name] for name in group))
        total += k
        flat = torch.cat([keys[name] for name in group])
        order = torch.randperm(len(flat), generator=generator).to(flat.device)
        best = order[flat[order].argsort(stable=True)[:k]]
        parts = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, best, True)
        for name, part in zip(group, parts.split([len(keys[n]) for n in group]), strict=True):
            mask[name][mask[name].clone()] = part
    if not total:
        raise DeltaflError(
            f"of {sum(counts.values())} eligible coordinates none would be kept; choose a lower "
            "sparsity"
        )
    return mask


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
    if recipe.calibration == "average":
        totals = {n: torch.zeros_like(part, dtype=torch.float64) for n, part in able.items()}
        for r in range(rounds):
            scores = score(r)
            totals = {n: total + scores[n].cpu() for n, total in totals.items()}
        return choose({n: total / rounds for n, total in totals.items()}, keep=keep)
    mask = able
    for r in range(1, rounds + 1):
        mask = choose(score(r - 1), keep=keep ** (r / rounds), among=mask)
    return mask


def completed(mask: Mask, net: Net) -> Mask:
    """The mask with what trains whole, a head."""
    whole = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in trained(net).items()}
    return whole | dict(mask)


def describe_mask(mask: Mask, able: Mask) -> list[dict[str, str | int | float]]:
    """Name, kept and eligible coordinates and the share of these that is kept of each tensor of
    `able`; one that holds query, key and value is `name[q]`, `name[k]` and `name[v]`.
    """
    rows = []
    for name, allowed in able.items():
        fused = re.search(r"(\bqkv\.|\bin_proj_)(weight|bias)$", name)
        labels = [f"{name}[{x}]" for x in "qkv"] if fused else [name]
        parts = (t.flatten().chunk(len(labels)) for t in (mask[name].cpu(), allowed))
        for label, *tensors in zip(labels, *parts, strict=True):
            kept, count = (int(tensor.sum()) for tensor in tensors)
            share = kept / count if count else 0
            rows.append({"name": label, "kept": kept, "eligible": count, "share": share})
    return rows


def model_hash(net: Net) -> str:
    """sha256 over names (those of the model's files), shapes and float32 values (little-endian) of
    the tensors that a mask narrows, in their order.
    """
    values, names = net.trained, eligible(net)
    about = {n: json.dumps([net.file_name(n), list(values[n].shape)]) for n in names}
    return hash_of(*(part for n in names for part in (about[n], values[n].float())))


def save_mask(mask: Mask, path: str | Path, model_hash: str, meta: Mapping[str, object]) -> Path:
    """Write a safetensors file of packed bits (uint8, 8 coordinates each, little bit order), whole
    or not at all.

    `model_hash`: of the model that the mask was made for. `meta`: values that JSON can hold.
    """
    packed = {n: np.packbits(m.cpu().numpy().ravel(), bitorder="little") for n, m in mask.items()}
    shapes = {name: list(kept.shape) for name, kept in mask.items()}
    about = {"format": FORMAT, "model_hash": model_hash, "shapes": shapes, "meta": dict(meta)}
    return write_atomically(path, save(packed, metadata={"deltafl": json.dumps(about)}))


def load_mask(path: str | Path, net: Net | None) -> tuple[Mask, dict[str, object]]:
    """The mask of a file, on the CPU, for the trained tensors of `net`, and its `meta`; None: of
    whatever model, to describe it. A head trains whole, whether the file has it or not.

    Raises:
        DeltaflError: no such file, not a mask, damaged, or made for another model.
    """
    mask: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {}).get("deltafl", "{}"))
            for name, shape in about.get("shapes", {}).items():
                bits = np.unpackbits(file.get_tensor(name), bitorder="little")
                mask[name] = torch.from_numpy(bits[: math.prod(shape)] > 0).reshape(shape)
    except (OSError, SafetensorError) as error:
        raise DeltaflError(f'mask "{path}" cannot be read: {error}') from None
    if about.get("format") != FORMAT:
        raise DeltaflError(f'"{path}" is not a mask; write one with `deltafl mask`')
    if net is None:
        return mask, about["meta"]
    able = eligible(net)
    if about["model_hash"] != model_hash(net) or not mask.keys() >= able.keys():
        raise DeltaflError(
            f'mask "{path}" was made for another model, or other weights of it; '
            "make a mask for this one"
        )
    return completed({name: mask[name] for name in able}, net), about["meta"]
