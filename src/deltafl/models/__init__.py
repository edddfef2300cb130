"""Models: load one by name, give it a head, say what of it trains, save it to load again."""

from deltafl.models.classifier import ClassifierNet
from deltafl.models.head import HEAD_FILE, Head, HeadFit, HeadRecipe
from deltafl.models.loading import load_net, new_net
from deltafl.models.net import Net

__all__ = [
    "HEAD_FILE",
    "ClassifierNet",
    "Head",
    "HeadFit",
    "HeadRecipe",
    "Net",
    "load_net",
    "new_net",
]
