"""mergekit's configurations as recipes."""

from deltafl.merge.mergekit.translation import translate

__all__ = ["translate"]
