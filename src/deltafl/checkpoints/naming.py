"""One name for one tensor: names of files and of modules, and prefixes that one side has."""

import re
from collections import Counter
from collections.abc import Collection

from deltafl.errors import DeltaflError

RENAMES = {
    r"(^|\.)encoder\.layer\.(\d+)\.": r"\1layers.\2.",
    r"(^|\.)model\.layer\.(\d+)\.": r"\1layer.\2.",
    r"\.attention\.attention\.query\.": ".attention.q_proj.",
    r"\.attention\.attention\.key\.": ".attention.k_proj.",
    r"\.attention\.attention\.value\.": ".attention.v_proj.",
    r"\.attention\.output\.dense\.": ".attention.o_proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"(layers\.\d+)\.output\.dense\.": r"\1.mlp.fc2.",
}


def canonical(name: str) -> str:
    """One name for a tensor that checkpoint files and transformers 5 modules call differently.

    transformers 5 holds ViT-like models under `layers.N.attention.q_proj` and still writes, and
    reads, files with `encoder.layer.N.attention.attention.query`.
    """
    for pattern, new in RENAMES.items():
        name = re.sub(pattern, new, name)
    return name


def match(
    target: Collection[str], given: Collection[str], scope: str = ""
) -> tuple[dict[str, str], str, str]:
    """Target name -> given name, by one common change of prefix; and both prefixes.

    The change of prefix (`vit.` dropped, `vision_model.` added, ...) is the one that matches most
    names; none is preferred to some. Only target names under the prefix `scope` count. Raises
    DeltaflError where two changes of prefix match equally many names.
    """
    targets = {canonical(n): n for n in target if n.startswith(scope)}
    givens = {canonical(n): n for n in given}
    found: list[tuple[int, int, str, str]] = []
    for ours in _prefixes(targets):
        rest = {n[len(ours) :] for n in targets if n.startswith(ours)}
        for theirs in _prefixes(givens):
            hits = sum(n.startswith(theirs) and n[len(theirs) :] in rest for n in givens)
            found.append((hits, -len(ours) - len(theirs), ours, theirs))
    hits, _, ours, theirs = max(found)
    equal = {o for h, _, o, t in found if h == hits > 0 and t == theirs}
    if rivals := {o for o in equal if not o.startswith(ours) and not ours.startswith(o)}:
        known = ", ".join(f'"{p.rstrip(".")}"' for p in sorted(rivals | {ours}))
        raise DeltaflError(
            f"its tensors fit several parts of the base equally well ({known}); "
            "choose one with --scope"
        )
    named = {n: theirs + n[len(ours) :] for n in targets if n.startswith(ours)}
    pairs = {targets[n]: givens[other] for n, other in named.items() if other in givens}
    return pairs, ours, theirs


def _prefixes(names: Collection[str]) -> list[str]:
    """ "" and the dotted prefixes, at most three parts, that a good part of the names share."""
    counts = Counter()
    for name in names:
        parts = name.split(".")[:-1][:3]
        counts.update(
            ".".join(parts[: i + 1]) + "." for i in range(len(parts)) if not parts[i].isdigit()
        )
    return ["", *(p for p, c in counts.items() if 10 * c >= len(names) or c >= 8)]
