"""Zero-shot heads: what CLIP's text tower says of the classes' names. transformers is imported
late.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltafl.checkpoints.layout import Layout, read_layout
from deltafl.errors import DeltaflError
from deltafl.models.head import Head
from deltafl.models.pretrained import build_module, explained, read_config, read_tokenizer
from deltafl.tasks.cache import Made, kept, stamps
from deltafl.tasks.catalogue import TEMPLATES, catalogue, prompt_names
from deltafl.tasks.images import ImageTask
from deltafl.tasks.task import Device

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BATCH = 256


def zero_shot_head(
    ref: str, task: ImageTask, templates: str | None = None, device: Device = "cpu"
) -> Head:
    """A head on L2-normalised image embeddings of the CLIP model `ref`, made from its text tower.

    For class c, w_c = exp(s) * u / |u| with u the mean over templates t of e(t, c) / |e(t, c)|,
    where e is the projected text embedding and s the model's logit scale; bias 0, weight float32
    (K, D). On projected image embeddings `head(features)` is then CLIPModel's `logits_per_image`.
    Source: arXiv 2103.00020, section 3.1.

    ref: a directory or hub id of a whole CLIP model with its tokenizer, or a folder of an image
    tower fine-tuned from one. The prompts speak of `prompt_names` of the task's classes. templates:
    a file of prompts, one on each line, with {} for the class; None: the catalogue's. Embeddings
    are kept in the data's cache by the model's files, names and templates.

    Raises:
        DeltaflError: no CLIP model, no text tower, no tokenizer, another number of classes than the
            catalogue's, a template without {}, no such file.
    """
    names, named = prompt_names(task.name, task.class_names), catalogue().get(task.name)
    prompts = named.templates if named else TEMPLATES
    if templates is not None:
        prompts = read_templates(templates)
    ref = _whole(ref)
    config, layout = read_config(ref), read_layout(ref)
    if config.model_type != "clip":
        raise DeltaflError(
            f'model "{ref}" is a "{config.model_type}" and no CLIP model with a text tower, '
            "which a zero-shot head needs; start from a CLIP model, or give another head"
        )

    def make(scratch: Path) -> Made:
        texts = [prompt.replace("{}", name) for name in names for prompt in prompts]
        each, scale = _embedded(layout, config, texts, device)
        mean = normalize(each.view(len(names), len(prompts), -1).mean(1), dim=-1)
        weight = (mean * scale).float().numpy()
        return Made([], weight.shape, [weight], "float32")

    files = [*layout.files, *sorted(layout.folder.glob("*.json")), *layout.folder.glob("*.txt")]
    _, weight = kept(["zero-shot", stamps(files), names, prompts], make)
    return Head(weight, torch.zeros(len(names)), task.class_names, normalised=True)


def _whole(ref: str) -> str:
    """The model that a folder of ours was fine-tuned from (training.json), back to the first."""
    file = Path(ref) / "training.json"
    base = file.is_file() and explained(ref, lambda: json.loads(file.read_text())["base"]["id"])
    return _whole(base) if base else ref


def read_templates(file: str | Path) -> tuple[str, ...]:
    """The lines of a file that are not blank.

    Raises:
        DeltaflError: it is no text file, it holds no line, or one without {}.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaflError(
            f'templates "{file}" cannot be read: {error}; give a text file, one on each line'
        ) from error
    found = tuple(filter(None, map(str.strip, lines)))
    wrong = [f'"{template}" has no {{}}' for template in found if "{}" not in template]
    if wrong or not found:
        raise DeltaflError(
            f'templates "{file}": {(*wrong, "there is none")[0]}; write one on each line, '
            "with {} where the name of the class goes"
        )
    return found


@torch.no_grad()
def _embedded(
    layout: Layout, config: "PretrainedConfig", texts: list[str], device: Device
) -> tuple[Tensor, Tensor]:
    """Normalised text embeddings, float64 (B, D), and the scale of logits, both on the CPU."""
    import transformers

    ref, kind = str(layout.folder), transformers.CLIPModel
    tokenizer = read_tokenizer(ref)
    model: Any = build_module(ref, kind, kind, config, None)[0].float()
    model.to(device).eval()
    parts = []
    how = {"max_length": config.text_config.max_position_embeddings, "return_tensors": "pt"}
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        tokens = tokenizer(batch, padding=True, truncation=True, **how).to(device)
        embedded = model.get_text_features(**tokens).pooler_output
        parts.append(normalize(embedded.double(), dim=-1).cpu())
    return torch.cat(parts), model.logit_scale.double().exp().cpu()
