"""A `Net` around an encoder and a head that are apart; goes when every room uses `Net`."""

from pathlib import Path

from torch import nn

from deltafl.models.classifier import Classifier, Head
from deltafl.models.encoder import LoadedEncoder
from deltafl.models.heads import HEAD_FILE, LinearHead, save_head
from deltafl.models.net import Net
from deltafl.models.prepare import ClassifierFormat


class EncoderFormat(ClassifierFormat):
    """As `save_encoder` writes it, the head beside it."""

    def __init__(self, encoder: LoadedEncoder) -> None:
        self.encoder = encoder

    def save(self, module: nn.Module, folder: Path) -> None:
        from dataclasses import replace

        from deltafl.models import save_encoder

        assert isinstance(module, Classifier)
        save_encoder(replace(self.encoder, module=module.encoder), folder)
        if module.head is not None:
            head = module.head
            linear = LinearHead(
                head.weight.detach(), head.bias.detach(), head.class_names, head.normalised
            )
            save_head(linear, folder / HEAD_FILE)


def net_of(encoder: LoadedEncoder, head: LinearHead | None = None) -> Net:
    """The encoder's module (not a copy) with a head on it, which trains where `head` does."""
    classifier = Classifier(encoder.module, encoder.embed, encoder.input, encoder.origin)
    if head is not None:
        module = Head(head.weight, head.bias, head.class_names, head.normalised)
        classifier.head = module.requires_grad_(bool(head.parameters()))
    return Net(classifier, encoder.input, EncoderFormat(encoder), encoder.origin)
