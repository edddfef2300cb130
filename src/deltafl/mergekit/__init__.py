"""mergekit's configurations as recipes."""

from deltafl.mergekit.translation import translate

__all__ = ["translate"]
