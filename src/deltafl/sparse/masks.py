"""Masks: which coordinates train. True = trainable; `sparsity` is the frozen fraction."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from deltafl.algebra.tensors import Tensors
from deltafl.errors import DeltaflError, shorten
from deltafl.files import write_atomically
from deltafl.models.flat import FlatModel
from deltafl.registry import Registry
from deltafl.sparse.eligible import Eligible

Mask: TypeAlias = Mapping[str, Tensor]
"""Tensor name -> bool in the tensor's shape, True = trainable, for every trainable tensor, in the model's order."""

Scope: TypeAlias = Literal["global", "per_layer"]

FORMAT = "mask 1"


@dataclass(frozen=True)
class Strategy:
    """What makes a coordinate worth keeping.

    keys: (scores, weights) of one tensor -> its keys, of which the smallest are kept. needs_scores: whether it reads
    sensitivities; the others must not.
    """

    needs_scores: bool
    keys: Callable[[Tensor, Tensor], Tensor]


MASK_STRATEGIES: Registry[Strategy] = Registry("mask strategy")

for _name, _strategy in {
    "least_sensitive": Strategy(True, lambda scores, weights: scores),
    "most_sensitive": Strategy(True, lambda scores, weights: -scores),
    "lowest_magnitude": Strategy(False, lambda scores, weights: weights.abs()),
    "highest_magnitude": Strategy(False, lambda scores, weights: -weights.abs()),
    "random": Strategy(False, lambda scores, weights: torch.zeros_like(weights)),
}.items():
    MASK_STRATEGIES.register(_name)(_strategy)


def check_sparsity(sparsity: float) -> None:
    """Raise DeltaflError unless 0 <= sparsity < 1."""
    if not 0 <= sparsity < 1:
        raise DeltaflError(
            f"sparsity is {sparsity}, the frozen fraction; write a number of at least 0 and below 1"
        )


def make_mask(
    strategy: str,
    *,
    sparsity: float,
    scope: Scope,
    eligible: Eligible,
    scores: Tensors | None,
    weights: Tensors,
    generator: torch.Generator,
) -> Mask:
    """Keep exactly k = round((1 - sparsity) * n) of n eligible coordinates, those that `strategy` prefers.

    global: n and k over all tensors at once. per_layer: n and k for each tensor by itself, so that the sum differs
    from the global k by up to half a coordinate a tensor. Equal keys at the threshold are drawn by a permutation from
    `generator` (on the CPU). `scores` (only read by the strategies that need them) and `weights` hold every tensor of
    `eligible`; the mask is on the device of each. Selection is exact for any number of elements.

    Raises:
        DeltaflError: unknown strategy or scope, sparsity outside [0, 1), scores absent, misshapen or NaN, nothing kept.
    """
    check_sparsity(sparsity)
    return select(
        strategy,
        keep=1 - sparsity,
        scope=scope,
        eligible=eligible,
        scores=scores,
        weights=weights,
        generator=generator,
        among=None,
    )


def select(
    strategy: str,
    *,
    keep: float,
    scope: Scope,
    eligible: Eligible,
    scores: Tensors | None,
    weights: Tensors,
    generator: torch.Generator,
    among: Mask | None,
) -> Mask:
    """As `make_mask`, k = round(keep * n), but chosen only among the coordinates that `among` holds; n is the same."""
    if scope not in ("global", "per_layer"):
        raise DeltaflError(f'unknown scope "{scope}"; known: global, per_layer')
    chosen = MASK_STRATEGIES[strategy]
    if chosen.needs_scores and scores is None:
        raise DeltaflError(
            f"{strategy} needs scores; compute sensitivities first, or choose a magnitude strategy"
        )
    given = [("weights", weights)] + (
        [("scores", scores)] if chosen.needs_scores and scores is not None else []
    )
    for kind, tensors in given:
        if missing := [n for n in eligible.shapes if n not in tensors]:
            raise DeltaflError(
                f"the {kind} lack {shorten(missing)}; give them for the model that is masked"
            )
        for name, shape in eligible.shapes.items():
            if tuple(tensors[name].shape) != shape:
                raise DeltaflError(
                    f'{kind} of "{name}" are {tuple(tensors[name].shape)}, the tensor is {shape}'
                )

    mask: dict[str, Tensor] = {}
    keys: dict[str, Tensor] = {}
    for name in eligible.shapes:
        weight = weights[name].detach()
        score = (
            scores[name].detach().to(weight.device)
            if chosen.needs_scores and scores is not None
            else weight
        )
        mask[name] = _candidates(name, eligible, among, weight.device)
        keys[name] = chosen.keys(_precise(score), _precise(weight))[mask[name]]
        if torch.isnan(keys[name]).any():
            raise DeltaflError(
                f'{given[-1][0]} of "{name}" hold NaN; was the model trained to divergence?'
            )
    groups = [list(mask)] if scope == "global" else [[name] for name in mask]
    kept = 0
    for group in groups:
        k = round(keep * sum(eligible.numel(name) for name in group))
        kept += k
        flat = torch.cat([keys.pop(name) for name in group])
        parts = _smallest(flat, k, generator).split([int(mask[name].sum()) for name in group])
        for name, part in zip(group, parts, strict=True):
            mask[name][mask[name].clone()] = part
    if not kept:
        raise DeltaflError(
            f"of {eligible.total} eligible coordinates none would be kept; choose a lower sparsity"
        )
    return mask


def _candidates(name: str, eligible: Eligible, among: Mask | None, device: torch.device) -> Tensor:
    """bool, in the tensor's shape: what may be kept."""
    part = eligible.of(name)
    full = torch.ones(eligible.shapes[name], dtype=torch.bool) if part is None else part.clone()
    full = full.to(device)
    return full if among is None else full & among[name].to(device)


def _precise(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _smallest(keys: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """bool (n,): exactly the k smallest keys; equal ones at the threshold are drawn."""
    if k in (0, len(keys)):
        return torch.full_like(keys, bool(k), dtype=torch.bool)
    threshold = keys.kthvalue(k).values
    kept = keys < threshold
    ties = (keys == threshold).nonzero()[:, 0]
    drawn = torch.randperm(len(ties), generator=generator)[: k - int(kept.sum())]
    kept[ties[drawn.to(ties.device)]] = True
    return kept


class Kept(NamedTuple):
    """How many coordinates of a tensor a mask keeps, and how many it might."""

    kept: int
    eligible: int

    @property
    def fraction(self) -> float:
        """kept / eligible; 0 where none is eligible."""
        return self.kept / self.eligible if self.eligible else 0.0


def describe_mask(mask: Mask, eligible: Eligible) -> dict[str, Kept]:
    """Kept and eligible coordinates of each tensor; a fused one is `name[q]`, `name[k]` and `name[v]`."""
    rows: dict[str, Kept] = {}
    for name, kept in mask.items():
        part = eligible.of(name)
        able = torch.ones_like(kept) if part is None else part.to(kept.device)
        if name in eligible.fused:
            for letter, a, b in zip("qkv", kept.chunk(3), able.chunk(3), strict=True):
                rows[f"{name}[{letter}]"] = Kept(int(a.sum()), int(b.sum()))
        else:
            rows[name] = Kept(int(kept.sum()), int(able.sum()))
    return rows


def model_hash(model: FlatModel) -> str:
    """sha256 over names, shapes and float32 values (little-endian) of the trainable tensors, in their order."""
    digest = hashlib.sha256()
    for name, tensor in model.tensors().items():
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.cpu().numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def save_mask(
    mask: Mask, path: str | Path, model_hash: str, meta: Mapping[str, Any] | None = None
) -> Path:
    """Write a safetensors file of packed bits (uint8, 8 coordinates each, little bit order), whole or not at all.

    `model_hash`: of the model that the mask was made for. `meta`: values that JSON can hold, for `mask_meta`.
    """
    packed = {
        name: np.packbits(kept.cpu().numpy().ravel(), bitorder="little")
        for name, kept in mask.items()
    }
    shapes = {name: list(kept.shape) for name, kept in mask.items()}
    about = {"format": FORMAT, "model_hash": model_hash, "shapes": shapes, "meta": dict(meta or {})}
    return write_atomically(path, save(packed, metadata={"deltafl": json.dumps(about)}))


def mask_meta(path: str | Path) -> dict[str, Any]:
    """What `save_mask` was given as `meta`."""
    return _read(path)[0]["meta"]


def load_mask(path: str | Path, model_hash: str | None) -> dict[str, Tensor]:
    """The mask of a file, on the CPU, for the model that has this hash; None: of whatever model, to describe it.

    Raises:
        DeltaflError: no such file, not a mask, damaged, or made for another model.
    """
    about, packed = _read(path)
    if model_hash is not None and about["model_hash"] != model_hash:
        raise DeltaflError(
            f'mask "{path}" was made for another model, or other weights of it; make a mask for this one'
        )
    mask = {}
    for name, shape in about["shapes"].items():
        count = math.prod(shape)
        if name not in packed or len(packed[name]) != -(-count // 8):
            raise DeltaflError(
                f'mask "{path}": tensor "{name}" has not the bits for {tuple(shape)}; make it anew'
            )
        bits = np.unpackbits(packed[name], count=count, bitorder="little")
        mask[name] = torch.from_numpy(bits.astype(bool)).reshape(shape)
    return mask


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the file says of itself, name -> packed bits)."""
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {}).get("deltafl", "{}"))
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DeltaflError(f'mask "{path}" cannot be read: {error}') from None
    if about.get("format") != FORMAT:
        raise DeltaflError(f'"{path}" is not a mask; write one with save_mask')
    return about, packed
