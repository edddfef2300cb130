"""Masks: which coordinates train. True = trainable; `sparsity` is the frozen fraction."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from deltafl.algebra.tensors import Tensors
from deltafl.errors import DeltaflError, shorten
from deltafl.files import write_atomically
from deltafl.models.net import Net
from deltafl.sparse.eligible import Eligible, eligible, trained
from deltafl.sparse.recipe import Scope
from deltafl.sparse.strategies import MASK_STRATEGIES

Mask: TypeAlias = Mapping[str, Tensor]
"""Name -> bool in the tensor's shape, True = trainable, for every trained tensor of a net."""

FORMAT = "mask 1"


def make_mask(
    strategy: str,
    *,
    keep: float,
    scope: Scope,
    eligible: Eligible,
    scores: Tensors | None,
    weights: Tensors,
    generator: torch.Generator,
    among: Mask | None = None,
) -> Mask:
    """Keep exactly k = round(keep * n) of n eligible coordinates, those that `strategy` prefers.

    global: n and k over all tensors at once. per_layer: n and k for each tensor by itself, so that
    the sum differs from the global k by up to half a coordinate a tensor. Equal keys at the
    threshold are drawn by a permutation from `generator` (on the CPU). `scores` (only read by the
    strategies that need them) and `weights` hold every tensor of `eligible`; the mask is on the
    device of each. among: choose only what this mask keeps; n is the same. Selection is exact for
    any number of elements.

    Raises:
        DeltaflError: unknown strategy, `keep` outside (0, 1], scores absent, misshapen or NaN, or
            nothing kept.
    """
    if not 0 < keep <= 1:
        raise DeltaflError(
            f"sparsity is {1 - keep}, the frozen share; write at least 0 and below 1"
        )
    chosen = MASK_STRATEGIES[strategy]
    if chosen.scored and scores is None:
        raise DeltaflError(
            f"{strategy} needs scores; compute sensitivities first, or choose a magnitude strategy"
        )
    read = scores if chosen.scored and scores is not None else weights
    kind = "scores" if chosen.scored else "weights"
    _check("weights", weights, eligible)
    _check(kind, read, eligible)
    mask: dict[str, Tensor] = {}
    keys: dict[str, Tensor] = {}
    for name in eligible.shapes:
        weight = _precise(weights[name])
        mask[name] = eligible.of(name).to(weight.device, copy=True)
        if among is not None:
            mask[name] &= among[name].to(weight.device)
        score = _precise(read[name]).to(weight.device)
        keys[name] = chosen.keys(score, weight)[mask[name]]
        if torch.isnan(keys[name]).any():
            raise DeltaflError(f'{kind} of "{name}" hold NaN; was the model trained to divergence?')
    kept = 0
    for group in [list(mask)] if scope == "global" else [[name] for name in mask]:
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
    return mask | {n: torch.ones(s, dtype=torch.bool) for n, s in eligible.whole.items()}


def _check(kind: str, tensors: Tensors, eligible: Eligible) -> None:
    if missing := [n for n in eligible.shapes if n not in tensors]:
        raise DeltaflError(
            f"the {kind} lack {shorten(missing)}; give them for the model that is masked"
        )
    for name, shape in eligible.shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise DeltaflError(
                f'{kind} of "{name}" are {tuple(tensors[name].shape)}, the tensor is {shape}'
            )


def _precise(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


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
    """Kept and eligible coordinates of each tensor that a mask narrows; a fused one is `name[q]`,
    `name[k]` and `name[v]`.
    """
    rows: dict[str, Kept] = {}
    for name in eligible.shapes:
        pairs = (mask[name].cpu(), eligible.of(name))
        if name in eligible.fused:
            for letter, a, b in zip("qkv", *(part.chunk(3) for part in pairs), strict=True):
                rows[f"{name}[{letter}]"] = Kept(int(a.sum()), int(b.sum()))
        else:
            rows[name] = Kept(*(int(part.sum()) for part in pairs))
    return rows


def model_hash(net: Net) -> str:
    """sha256 over names (those of the model's files), shapes and float32 values (little-endian) of
    the tensors that a mask narrows, in their order.
    """
    digest = hashlib.sha256()
    narrowed = eligible(net).shapes
    for name, tensor in trained(net).items():
        if name in narrowed:
            about = [net.file_name(name), list(tensor.shape)]
            digest.update(json.dumps(about).encode())
            values = tensor.detach().float().cpu().numpy()
            digest.update(values.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def save_mask(
    mask: Mask, path: str | Path, model_hash: str, meta: Mapping[str, Any] | None = None
) -> Path:
    """Write a safetensors file of packed bits (uint8, 8 coordinates each, little bit order), whole
    or not at all.

    `model_hash`: of the model that the mask was made for. `meta`: values that JSON can hold, for
    `mask_meta`.
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


def load_mask(path: str | Path, net: Net | None) -> dict[str, Tensor]:
    """The mask of a file, on the CPU, for the trained tensors of `net`; None: of whatever model,
    under the names in the file, to describe it.

    The file may name tensors as the net or as the net's files do. A head trains whole, whether the
    file has it or not.

    Raises:
        DeltaflError: no such file, not a mask, damaged, or made for another model.
    """
    about, packed = _read(path)
    mask = {}
    for name, shape in about["shapes"].items():
        count = math.prod(shape)
        if name not in packed or len(packed[name]) != -(-count // 8):
            raise DeltaflError(
                f'mask "{path}": tensor "{name}" has not the bits for {tuple(shape)}; make it anew'
            )
        bits = np.unpackbits(packed[name], count=count, bitorder="little")
        mask[name] = torch.from_numpy(bits.astype(bool)).reshape(shape)
    if net is None:
        return mask
    if about["model_hash"] != model_hash(net):
        raise DeltaflError(
            f'mask "{path}" was made for another model, or other weights of it; '
            "make a mask for this one"
        )
    able = eligible(net)
    given = {n: n if n in mask else net.file_name(n) for n in able.shapes}
    if len(set(given.values()) & mask.keys()) < len(given):
        raise DeltaflError(f'mask "{path}" names its tensors in another way; make it anew')
    whole = {n: torch.ones(s, dtype=torch.bool) for n, s in able.whole.items()}
    return {name: mask[there] for name, there in given.items()} | whole


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the file says of itself, name -> packed bits)."""
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {}).get("deltafl", "{}"))
            packed = {name: file.get_tensor(name) for name in about.get("shapes", ())}
    except (OSError, SafetensorError) as error:
        raise DeltaflError(f'mask "{path}" cannot be read: {error}') from None
    if about.get("format") != FORMAT:
        raise DeltaflError(f'"{path}" is not a mask; write one with `deltafl mask`')
    return about, packed
