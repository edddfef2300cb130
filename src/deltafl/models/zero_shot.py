"""Zero-shot heads: what CLIP's text tower says of the classes' names. transformers is imported
late.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltafl.checkpoints.layout import Layout, read_layout
from deltafl.errors import DeltaflError, shorten
from deltafl.models.families import attempt, quiet, read_config
from deltafl.models.fit import HEADS
from deltafl.models.head import Head
from deltafl.models.head_recipe import HeadFit, HeadRecipe
from deltafl.models.net import Net
from deltafl.tasks.cache import Made, kept, stamps
from deltafl.tasks.catalogue import prompt_names, prompt_templates
from deltafl.tasks.images import ImageTask

FORMAT = 1
"""Raise it when the same inputs should give other embeddings: cached ones are then not found."""

BATCH = 256


@HEADS.register("zero-shot")
def _zero_shot(net: Net, task: ImageTask, recipe: HeadRecipe, fit: HeadFit) -> Head:
    """A fine-tuned image tower has no text tower: that of its base (training.json) is used."""
    ref, seen = net.origin, set()
    while (file := Path(ref) / "training.json").is_file() and ref not in seen:
        seen.add(ref)
        try:
            ref = json.loads(file.read_text())["base"]["id"] or ref
        except (ValueError, KeyError, TypeError) as error:
            raise DeltaflError(
                f'"{file}" names no base ({error}); a zero-shot head needs its text tower'
            ) from error
    given = None if recipe.templates is None else read_templates(recipe.templates)
    return zero_shot_head(ref, task.name, task.class_names, templates=given, device=net.device)


def zero_shot_head(
    ref: str,
    task: str,
    class_names: Sequence[str],
    *,
    templates: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> Head:
    """A head on L2-normalised image embeddings of the CLIP model `ref`, made from its text tower.

    For class c, w_c = exp(s) * u / |u| with u the mean over templates t of e(t, c) / |e(t, c)|,
    where e is the projected text embedding and s the model's logit scale; bias 0, weight float32
    (K, D).
    `head(features)` is then CLIPModel's `logits_per_image` for the projected image embeddings that
    the encoder gives. Source: arXiv 2103.00020, section 3.1.

    ref: a directory or hub id of a whole CLIP model with its tokenizer. task, class_names: of the
    data; the prompts speak of `prompt_names` of them. templates: prompts with {} for the class;
    None: the catalogue's. Embeddings are kept in the data's cache by the model's files, names and
    templates.

    Raises:
        DeltaflError: no CLIP model, no text tower, no tokenizer, another number of classes than the
            catalogue's, a template without {}.
    """
    names = prompt_names(task, class_names)
    chosen = tuple(templates) if templates is not None else prompt_templates(task)
    if wrong := [t for t in chosen if "{}" not in t]:
        raise DeltaflError(
            f"template {shorten(wrong)} has no {{}}; write {{}} where the name of the class goes"
        )
    if not chosen:
        raise DeltaflError(
            "no templates; write one on each line, with {} for the name of the class"
        )
    layout = _clip_layout(ref)
    files = [*layout.files, *sorted(layout.folder.glob("*.json")), *layout.folder.glob("*.txt")]

    def make(scratch: Path) -> Made:
        weight = _weights(str(layout.folder), ref, names, chosen, device).numpy()
        return Made({}, weight.shape, [weight], "float32")

    made_of = {"model": stamps(files), "names": names, "templates": chosen, "zero-shot": FORMAT}
    _, weight = kept(made_of, make)
    return Head(weight, torch.zeros(len(names)), class_names, normalised=True)


def read_templates(file: str | Path) -> tuple[str, ...]:
    """The lines of a file that are not blank.

    Raises:
        DeltaflError: no such file, or nothing in it.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaflError(
            f'templates "{file}" cannot be read: {error}; give a text file, one on each line'
        ) from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise DeltaflError(
            f'templates "{file}" holds none; write one on each line, with {{}} for the class'
        )
    return found


def _clip_layout(ref: str) -> Layout:
    """Where the model's files are, which must be those of a whole CLIP model and its tokenizer."""
    config = read_config(ref)
    if config.model_type != "clip":
        raise DeltaflError(
            f'model "{ref}" is a "{config.model_type}" and no CLIP model with a text tower, '
            "which a zero-shot head needs; start from a CLIP model, or give another head"
        )
    layout = read_layout(ref)
    if not any(name.startswith("text_model.") for name in layout.entries):
        raise DeltaflError(
            f'model "{ref}" holds no text tower, which a zero-shot head needs; use the base model'
        )
    held = {file.name for file in layout.folder.iterdir()}
    # transformers would make an empty tokenizer
    if not ("tokenizer.json" in held or {"vocab.json", "merges.txt"} <= held):
        raise DeltaflError(
            f'model "{ref}" has no tokenizer (tokenizer.json, or vocab.json and merges.txt), '
            "which a zero-shot head needs; copy it from the model's origin"
        )
    return layout


@torch.no_grad()
def _weights(
    folder: str,
    ref: str,
    names: Sequence[str],
    templates: Sequence[str],
    device: torch.device | str,
) -> Tensor:
    """float32 (K, D) on the CPU."""
    import transformers

    with quiet():
        tokenizer = attempt(ref, transformers.AutoTokenizer.from_pretrained, folder)
        load: Any = transformers.CLIPModel.from_pretrained
        how = {"dtype": torch.float32, "output_loading_info": True}
        model, info = attempt(ref, load, folder, **how)
    needed = ("text_model.", "text_projection.", "logit_scale")
    if missing := sorted(key for key in info["missing_keys"] if key.startswith(needed)):
        raise DeltaflError(
            f'model "{ref}": {shorten(missing)} missing in the file; is it complete?'
        )
    model.to(device).eval()
    prompts = [template.replace("{}", name) for name in names for template in templates]
    length = model.config.text_config.max_position_embeddings
    parts = [
        _embedded(model, tokenizer, prompts[start : start + BATCH], length)
        for start in range(0, len(prompts), BATCH)
    ]
    each = torch.cat(parts).view(len(names), len(templates), -1)
    mean = torch.nn.functional.normalize(each.mean(1), dim=-1)
    return (mean * model.logit_scale.double().exp().cpu()).float().contiguous()


def _embedded(model: Any, tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Normalised text embeddings, float64 (B, D) on the CPU."""
    tokens = tokenizer(
        list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    pooled = model.text_model(**tokens.to(model.device)).pooler_output
    return torch.nn.functional.normalize(model.text_projection(pooled).double(), dim=-1).cpu()
