"""A model and a task that train in a second, and a plug-in factory, for the tests of training."""

from pathlib import Path

import torch
from torch import Tensor, nn

from deltafl.models import LoadedEncoder, load_encoder
from deltafl.models.heads import LinearHead, random_head
from deltafl.tasks import ImageInput, ImageTask
from deltafl.tasks.arrays import Split, Task, image_task

NAMES = ("dark", "left", "right")


def tiny_vit(seed: int = 0) -> LoadedEncoder:
    return load_encoder(
        f"vit:hidden=16,layers=2,heads=2,patch=4,image_size=8,channels=1,seed={seed}"
    )


def tiny_task(train: int = 50, val: int = 20, test: int = 31) -> Task:
    """Noise with a bright left or right half, or none: learnable, and not learned at once."""

    def split(count: int, seed: int) -> Split:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 160, (count, 1, 8, 8), generator=generator)
        labels = torch.arange(count) % 3
        images[labels == 1, :, :, :4] += 60
        images[labels == 2, :, :, 4:] += 60
        return Split(images.to(torch.uint8), labels)

    return Task("halves", split(train, 1), split(val, 2), split(test, 3), NAMES)


def tiny_head(dim: int = 16) -> LinearHead:
    return random_head(dim, NAMES, torch.Generator().manual_seed(5))


class Net(nn.Module):
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


def tied_net() -> Net:
    net = Net()
    net.twin = net.conv
    return net


def tiny_task_factory(inputs: ImageInput, seed: int) -> ImageTask:
    return image_task(tiny_task())


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:'\"-"
TOWER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def tiny_clip(folder: Path, seed: int = 0):
    """A tiny CLIP with a tokenizer of single letters; returns transformers' model and tokenizer as they load again."""
    import transformers as t

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    t.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(
        folder
    )
    end = len(words) - 1
    text = TOWER | {
        "vocab_size": len(words),
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    text |= {"max_position_embeddings": 48}
    vision = TOWER | {"image_size": 8, "patch_size": 4}
    torch.manual_seed(seed)
    model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    for parameter in model.parameters():  # the small initial weights make all texts nearly alike
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return t.CLIPModel.from_pretrained(folder).eval(), t.AutoTokenizer.from_pretrained(folder)


def tiny_llama(folder: Path, seed: int = 0):
    """A Llama with random weights on bytes; `folder` gets its configuration and tokenizer."""
    import transformers as t

    from deltafl.models.causal import new_causal

    t.ByT5Tokenizer().save_pretrained(folder)
    config = t.LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    config.save_pretrained(folder)
    return new_causal(str(folder), config, seed)


def write_lines(folder: Path, count: int = 30) -> Path:
    """Two sources of lines that are easily learnt."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {"a": "one and {} are more", "b": "the {}th of May"}
    for name, text in sources.items():
        lines = "\n".join(text.format(i) for i in range(count))
        (folder / f"train-{name}.txt").write_text(lines)
        (folder / f"test-{name}.txt").write_text(text.format(100 + len(name)) + "\n\n")
    return folder
