"""A model and a task that train in a second, and a plug-in factory, for the tests of training."""

import json
import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from deltafl.models import HeadRecipe, Net, load_net, new_net
from deltafl.tasks import ImageInput, Images, ImageTask, load_task
from deltafl.training import Evaluation, evaluate

NAMES = ("dark", "left", "right")


VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "patch_size": 4, "image_size": 8, "num_channels": 1,
}  # fmt: skip


def vit_file(**changes: int) -> str:
    """A config.json of a tiny ViT, as users name a new model."""
    settings = json.dumps(VIT | changes)
    name = "-".join(["vit", *(f"{key}-{value}" for key, value in changes.items())])
    file = Path(os.environ["DELTAFL_CACHE"]) / f"{name}.json"
    file.write_text(settings)
    return str(file)


def tiny_net(seed: int = 0) -> Net:
    return new_net(VIT | {"seed": seed})


def tiny_images(train: int = 50, val: int = 20, test: int = 31) -> ImageTask:
    """Noise with a bright left or right half, or none: learnable, and not learned at once."""

    def split(count: int, seed: int) -> Images:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 160, (count, 1, 8, 8), generator=generator)
        labels = torch.arange(count) % 3
        images[labels == 1, :, :, :4] += 60
        images[labels == 2, :, :, 4:] += 60
        return Images(images.to(torch.uint8), labels)

    splits = {"train": split(train, 1), "val": split(val, 2), "test": split(test, 3)}
    return ImageTask("halves", splits, NAMES)


class Convolution(nn.Module):
    """A plug-in with batch norm (so that it has buffers) and a classifier that features do not use."""

    input_size, channels, mean, std = 8, 1, (0.25,), (0.5,)

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, 4)

    def embed(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.embed(x))


def classifier(train_head: bool = False) -> tuple[Net, ImageTask]:
    """A tiny ViT with a head for the tiny images."""
    net, task = tiny_net(), tiny_images()
    net.prepare(task, HeadRecipe(head="linear", train_head=train_head))
    return net, task


def saved(net: Net, folder: Path) -> Path:
    """The folder, new, that holds the model."""
    folder.mkdir(parents=True)
    net.save(folder)
    return folder


def tied_net() -> Convolution:
    net = Convolution()
    net.twin = net.conv
    return net


def own_net(width: int = 6) -> Net:
    """A whole model of one's own, which needs no head."""
    module = nn.Sequential(Convolution(width), nn.Linear(4, 3))
    return Net(module, ImageInput(8, 1, (0.25,), (0.5,)))


def without_timings(rows):
    """The rows without their `seconds`, `*_seconds` and `peak_memory_bytes`: what two runs with one seed share."""
    drop = ("seconds", "peak_memory_bytes")
    return [{k: v for k, v in row.items() if not k.endswith(drop)} for row in rows]


def tiny_task_factory(inputs: ImageInput, seed: int) -> ImageTask:
    return tiny_images()


def judged(
    folder: Path, data: str, split: Literal["val", "test"] = "test", head=None, seed=0
) -> Evaluation:
    """What a saved model scores on a task, with a head from a file or its own."""
    net = load_net(folder)
    task = load_task(data, net.inputs, seed)
    if head is not None:
        net.prepare(task, HeadRecipe(head=str(head)))
    return evaluate(net, task, split)


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:'\"-"
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2}
TOWER = {"hidden_size": 16, "intermediate_size": 32, **SIZES}


def tiny_clip(folder: Path, seed: int = 0):
    """A tiny CLIP with a tokenizer of single letters; returns transformers' model and tokenizer as they load again."""
    import transformers as t

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    t.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    end = len(words) - 1
    marks = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    text = TOWER | marks | {"vocab_size": len(words), "max_position_embeddings": 48}
    vision = TOWER | {"image_size": 8, "patch_size": 4}
    torch.manual_seed(seed)
    model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    for parameter in model.parameters():  # the small initial weights make all texts nearly alike
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return t.CLIPModel.from_pretrained(folder).eval(), t.AutoTokenizer.from_pretrained(folder)


def tiny_llama(folder: Path, seed: int = 0, **changes: int) -> Net:
    """A Llama with random weights on bytes; `folder` gets its configuration and tokenizer."""
    import transformers as t

    t.ByT5Tokenizer().save_pretrained(folder)
    sizes = SIZES | {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64}
    settings = {
        "model_type": "llama",
        "max_position_embeddings": 64,
        "seed": seed,
        **sizes,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return load_net(folder / "config.json")


def write_lines(folder: Path, count: int = 30) -> Path:
    """Two sources of lines that are easily learnt."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {"a": "one and {} are more", "b": "the {}th of May"}
    for name, text in sources.items():
        lines = "\n".join(text.format(i) for i in range(count))
        (folder / f"train-{name}.txt").write_text(lines)
        (folder / f"test-{name}.txt").write_text(text.format(100 + len(name)) + "\n\n")
    return folder
