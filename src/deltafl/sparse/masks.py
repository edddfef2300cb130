"""Masks: which coordinates train. True = trainable; `sparsity` is the frozen fraction."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
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
from deltafl.sparse.recipe import Scope
from deltafl.sparse.strategies import MASK_STRATEGIES

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
    mask: dict[str, Tensor] = {}
    keys: dict[str, Tensor] = {}
    for name, allowed in able.items():
        value = values[name].detach()
        mask[name] = (allowed if among is None else among[name]).to(value.device, copy=True)
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        keys[name] = chosen.keys(value)[mask[name]]
        if torch.isnan(keys[name]).any():
            raise DeltaflError(
                f'{"scores" if chosen.scored else "weights"} of "{name}" hold NaN; was the model '
                "trained to divergence?"
            )
    counts = {name: int(allowed.sum()) for name, allowed in able.items()}
    kept = 0
    for group in [list(mask)] if scope == "global" else [[name] for name in mask]:
        k = round(keep * sum(counts[name] for name in group))
        kept += k
        flat = torch.cat([keys.pop(name) for name in group])
        parts = _smallest(flat, k, generator).split([int(mask[name].sum()) for name in group])
        for name, part in zip(group, parts, strict=True):
            mask[name][mask[name].clone()] = part
    if not kept:
        raise DeltaflError(
            f"of {sum(counts.values())} eligible coordinates none would be kept; choose a lower "
            "sparsity"
        )
    return mask


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
        parts = {name: (mask[name].cpu(), allowed)}
        if re.search(r"(\bqkv\.|\bin_proj_)(weight|bias)$", name):
            thirds = zip(*(part.chunk(3) for part in parts[name]), strict=True)
            parts = {f"{name}[{x}]": third for x, third in zip("qkv", thirds, strict=True)}
        for part, tensors in parts.items():
            kept, count = (int(tensor.sum()) for tensor in tensors)
            share = kept / count if count else 0
            rows.append({"name": part, "kept": kept, "eligible": count, "share": share})
    return rows


def model_hash(net: Net) -> str:
    """sha256 over names (those of the model's files), shapes and float32 values (little-endian) of
    the tensors that a mask narrows, in their order.
    """
    digest = hashlib.sha256()
    values = net.trained
    for name in eligible(net):
        tensor = values[name]
        about = [net.file_name(name), list(tensor.shape)]
        digest.update(json.dumps(about).encode())
        digest.update(tensor.float().cpu().numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


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
                count = math.prod(shape)
                bits = np.unpackbits(file.get_tensor(name), count=count, bitorder="little")
                mask[name] = torch.from_numpy(bits.astype(bool)).reshape(shape)
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
