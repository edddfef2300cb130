"""Zero-shot heads: what CLIP's text tower says of the classes' names. transformers is imported
late.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltafl.checkpoints.layout import Layout, read_layout
from deltafl.errors import DeltaflError, shorten
from deltafl.models.classifier import HEADS, ClassifierNet
from deltafl.models.families import build_module, explained, read_config
from deltafl.models.head import Head
from deltafl.models.head_recipe import HeadFit, HeadRecipe
from deltafl.tasks.cache import Made, kept, stamps
from deltafl.tasks.catalogue import TEMPLATES, catalogue, prompt_names
from deltafl.tasks.images import ImageTask
from deltafl.tasks.task import Device

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FORMAT = 1
"""Raise it when the same inputs should give other embeddings: cached ones are then not found."""

BATCH = 256


@HEADS.register("zero-shot")
def _zero_shot(net: ClassifierNet, task: ImageTask, recipe: HeadRecipe, fit: HeadFit) -> Head:
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
    device: Device = "cpu",
) -> Head:
    """A head on L2-normalised image embeddings of the CLIP model `ref`, made from its text tower.

    For class c, w_c = exp(s) * u / |u| with u the mean over templates t of e(t, c) / |e(t, c)|,
    where e is the projected text embedding and s the model's logit scale; bias 0, weight float32
    (K, D). On projected image embeddings `head(features)` is then CLIPModel's `logits_per_image`.
    Source: arXiv 2103.00020, section 3.1.

    ref: a directory or hub id of a whole CLIP model with its tokenizer. task, class_names: of the
    data; the prompts speak of `prompt_names` of them. templates: prompts with {} for the class;
    None: the catalogue's. Embeddings are kept in the data's cache by the model's files, names and
    templates.

    Raises:
        DeltaflError: no CLIP model, no text tower, no tokenizer, another number of classes than the
            catalogue's, a template without {}.
    """
    names, named = prompt_names(task, class_names), catalogue().get(task)
    if templates is None:
        templates = named.templates if named else TEMPLATES
    if wrong := [t for t in templates if "{}" not in t]:
        raise DeltaflError(
            f"template {shorten(wrong)} has no {{}}; write {{}} where the name of the class goes"
        )
    if not templates:
        raise DeltaflError(
            "no templates; write one on each line, with {} for the name of the class"
        )
    config, layout = read_config(ref), read_layout(ref)
    if config.model_type != "clip":
        raise DeltaflError(
            f'model "{ref}" is a "{config.model_type}" and no CLIP model with a text tower, '
            "which a zero-shot head needs; start from a CLIP model, or give another head"
        )
    # transformers would make an empty tokenizer
    held = {file.name for file in layout.folder.iterdir()}
    if not ("tokenizer.json" in held or {"vocab.json", "merges.txt"} <= held):
        raise DeltaflError(
            f'model "{ref}" has no tokenizer (tokenizer.json, or vocab.json and merges.txt), '
            "which a zero-shot head needs; copy it from the model's origin"
        )
    prompts = [template.replace("{}", name) for name in names for template in templates]

    def make(scratch: Path) -> Made:
        each, scale = _embedded(layout, config, prompts, device)
        mean = normalize(each.view(len(names), len(templates), -1).mean(1), dim=-1)
        weight = (mean * scale).float().contiguous().numpy()
        return Made({}, weight.shape, [weight], "F32")

    files = [*layout.files, *sorted(layout.folder.glob("*.json")), *layout.folder.glob("*.txt")]
    made_of = {"model": stamps(files), "names": names, "templates": templates, "zero-shot": FORMAT}
    _, weight = kept(made_of, make)
    return Head(weight, torch.zeros(len(names)), class_names, normalised=True)


def read_templates(file: str | Path) -> tuple[str, ...]:
    """The lines of a file that are not blank. Raises DeltaflError if it is no text file."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaflError(
            f'templates "{file}" cannot be read: {error}; give a text file, one on each line'
        ) from error
    return tuple(line.strip() for line in lines if line.strip())


@torch.no_grad()
def _embedded(
    layout: Layout, config: "PretrainedConfig", prompts: Sequence[str], device: Device
) -> tuple[Tensor, Tensor]:
    """Normalised text embeddings, float64 (B, D), and the scale of logits, both on the CPU."""
    import transformers

    ref, kind = str(layout.folder), transformers.CLIPModel
    tokenizer = explained(ref, transformers.AutoTokenizer.from_pretrained, ref)
    model: Any = build_module(ref, kind, kind, config, None)[0].float()
    model.to(device).eval()
    parts = []
    how = {"max_length": config.text_config.max_position_embeddings, "return_tensors": "pt"}
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        tokens = tokenizer(batch, padding=True, truncation=True, **how).to(device)
        embedded = model.text_projection(model.text_model(**tokens).pooler_output)
        parts.append(normalize(embedded.double(), dim=-1).cpu())
    return torch.cat(parts), model.logit_scale.double().exp().cpu()
