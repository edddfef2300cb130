"""Models: load one by name, give it a head, say what of it trains, save it to load again."""

from deltafl.models import probe, ridge, zero_shot  # noqa: F401  (they register)
from deltafl.models.head import HEAD_FILE, Head
from deltafl.models.head_recipe import HeadFit, HeadRecipe
from deltafl.models.loading import load_net, new_net
from deltafl.models.net import Format, Net

__all__ = [
    "HEAD_FILE",
    "Format",
    "Head",
    "HeadFit",
    "HeadRecipe",
    "Net",
    "load_net",
    "new_net",
]
