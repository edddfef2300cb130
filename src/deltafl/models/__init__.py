"""Models: load one by name, give it a head, say what of it trains, save it to load again."""

from deltafl.models.adapter import LoraRecipe, add_lora
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
    "LoraRecipe",
    "Net",
    "add_lora",
    "load_net",
    "new_net",
]
