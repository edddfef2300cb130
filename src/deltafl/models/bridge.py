"""A `Net` around an encoder and a head that are apart; goes when every room uses `Net`."""

from deltafl.models.classifier import Classifier
from deltafl.models.encoder import LoadedEncoder
from deltafl.models.fit import ClassifierFormat
from deltafl.models.head import Head
from deltafl.models.heads import LinearHead
from deltafl.models.net import Net


def net_of(encoder: LoadedEncoder, head: LinearHead | None = None) -> Net:
    """The encoder's module (not a copy) with a head on it, which trains where `head` does."""
    classifier = Classifier(encoder.module, encoder.embed, encoder.input, "")
    if head is not None:
        module = Head(head.weight, head.bias, head.class_names, head.normalised)
        classifier.head = module.requires_grad_(bool(head.parameters()))
    return Net(classifier, encoder.input, encoder.format or ClassifierFormat(), encoder.origin)
