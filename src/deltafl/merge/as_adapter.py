"""A merged update as a LoRA: the nearest matrices of a rank, in peft's files."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.low_rank import LowRank, nearest
from deltafl.algebra.streaming import Unit, visit
from deltafl.algebra.tensors import Lazy
from deltafl.checkpoints.adapter import CONFIG, PREFIX
from deltafl.checkpoints.checkpoint import torch_dtype
from deltafl.checkpoints.layout import ADAPTER, lasting_ref
from deltafl.errors import DeltaflError, shorten
from deltafl.merge.plan import Facts, Plan
from deltafl.merge.recipe import MergeRecipe
from deltafl.progress import OnProgress

NEGLIGIBLE = 1e-3
"""Norm of what is no linear layer's matrix, relative to the update's, that may be left out."""

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Types of models whose matrices are (in, out)."""

_MATRIX = re.compile(r"(.*\.)?(?!wte\.|wpe\.|shared\.|[^.]*embed)[^.]+\.weight")


def write_lora(
    plan: Plan, update: Lazy, scale: Callable[[str], float], folder: Path, on_progress: OnProgress
) -> Facts:
    """Write scale * update as an adapter, of the ranks that the recipe asks for; ranks and errors,
    to be recorded.

    Of adapters under a linear rule no matrix is made (see `nearest`). Each process holds one.

    Raises:
        DeltaflError: what else than matrices of linear layers changes is not negligible.
    """
    recipe, config = plan.recipe, plan.base.folder / "config.json"
    dtype = torch_dtype(recipe.stored_dtype or "F32")
    model_type = json.loads(config.read_text()).get("model_type") if config.is_file() else None
    transposed = model_type in CONV1D
    specs = {name: update.spec(name) for name in update}
    linear = {n for n, spec in specs.items() if len(spec.shape) == 2 and _MATRIX.fullmatch(n)}

    def factors(unit: Unit) -> list[tuple[str, float, float, list[Tensor]]]:
        """Of each tensor its norm and, of a matrix, the error and A and B."""
        found = []
        for name in dict.fromkeys(name for name, _, _ in unit):
            if name not in linear:
                norm = abs(scale(name)) * float(update[name].double().norm())
                found.append((name, norm, 0.0, []))
                continue
            b, a, norm, error = _factors(update, name, scale(name), recipe)
            sides = (b.mT, a.mT) if transposed else (a, b)
            found.append((name, norm, error, [side.to(dtype).contiguous() for side in sides]))
        return found

    options = {"name": "writing", "on_progress": on_progress}
    passed = visit(specs, factors, plan.threads, whole=True, **options)
    tensors, norms, errors = dict[str, Tensor](), dict[str, float](), dict[str, float]()
    ranks = dict[str, int]()
    named = {n: own for label in plan.adapters for n, own in plan.alignment.names[label].items()}
    for name, norm, error, sides in (one for found in passed for one in found if one[1]):
        norms[name] = norm
        module = named.get(name, name).removesuffix(".weight")
        for side, tensor in zip("AB", sides, strict=False):
            tensors[f"{PREFIX}{module}.lora_{side}.weight"] = tensor
            errors[name], ranks[module] = error, sides[0].shape[0]
    left_out = [name for name in norms if name not in linear]
    lost = math.hypot(*(norms[name] for name in left_out))
    if not errors or lost > NEGLIGIBLE * math.hypot(*norms.values()):
        raise DeltaflError(
            f"--as-adapter: {len(errors)} matrices of linear layers change, and {len(left_out)} "
            f"other tensors ({shorten(left_out)}), which an adapter cannot hold; "
            "copy these from the base with --exclude, or write a whole model"
        )
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    settings = _settings(ranks) | {
        "base_model_name_or_path": lasting_ref(recipe.base),
        "fan_in_fan_out": transposed,
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2))
    return {"adapter": {"errors": errors, "ranks": ranks, "left_out": left_out}}


def _settings(ranks: Mapping[str, int]) -> Facts:
    """peft's, of products that nothing scales: alpha is the rank. ranks: by module."""
    most = max(ranks.values())
    others = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank < most}
    return {
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": [*ranks],
    }


def _factors(
    update: Lazy, name: str, scale: float, recipe: MergeRecipe
) -> tuple[Tensor, Tensor, float, float]:
    """As `nearest`, of the recipe's rank, that of the matrix at most; a sum of adapters that is to
    be kept whole is their factors side by side.
    """
    left, right = _product(update, name)
    left = left * scale
    if right is not None and recipe.energy == 1 and recipe.as_adapter is None:
        grams = (left.mT @ left).double() * (right @ right.mT).double()
        return left, right, max(0.0, float(grams.sum())) ** 0.5, 0.0
    rank = min(recipe.as_adapter or 1 << 30, *update.spec(name).shape)
    return nearest(left, right, rank, recipe.energy)


def _product(update: Lazy, name: str) -> tuple[Tensor, Tensor | None]:
    """Factors of a tensor of the update, or it itself."""
    terms = update.terms(name) if isinstance(update, Aggregate) else None
    deltas = [(c, delta.factors(name)) for c, delta in terms or () if isinstance(delta, LowRank)]
    parts = [(c * found[0], found[1]) for c, found in deltas if found]
    if not parts or terms is None or len(deltas) < len(terms):
        return update[name], None
    return torch.cat([left for left, _ in parts], 1), torch.cat([right for _, right in parts])
