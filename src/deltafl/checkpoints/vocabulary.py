"""The tokens of models, the rows that their tensors hold for them, and one vocabulary for several.

Reads headers, config.json and tokenizer.json alone, and no torch.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from deltafl.checkpoints.layout import Layout
from deltafl.checkpoints.tokenizer import read_object
from deltafl.errors import DeltaflError

ROWS = re.compile(
    r"(.*\.)?(embed_tokens|tok_embeddings|token_embedding|word_embeddings|wte|embed_in|shared"
    r"|lm_head|embed_out|predictions|predictions\.decoder)\.(weight|bias)"
)
"""Names of tensors that hold a row, or a number, for each token."""

Sources: TypeAlias = tuple[tuple[str, int], ...]
"""(model, its row) of all whose mean a row is; of none it is zero."""


@dataclass(frozen=True)
class Vocabulary:
    """Token -> id; the entries in tokenizer.json of those that were added to what splits text; and
    the tensors that hold a row for each, with so many rows.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    tensors: tuple[str, ...]
    rows: int

    @property
    def size(self) -> int:
        """The least number of rows that hold all."""
        return 1 + max(self.ids.values(), default=-1)

    def extended(self, entries: Iterable[Mapping[str, Any]]) -> "Vocabulary":
        """With these added, those that it lacks under the ids that follow.

        Raises DeltaflError if there are gaps before, which a tokenizer would give to them.
        """
        ids, added, size = dict(self.ids), dict(self.added), self.size
        for entry in entries:
            token = entry["content"]
            if token not in ids:
                ids[token], size = size, size + 1
            added.setdefault(token, {**entry, "id": ids[token]})
        if len(self.ids) < self.size < size:
            raise DeltaflError(
                "vocabulary: the ids of the tokens that are kept have gaps, so none can be "
                "added; choose base or a model, and no new tokens"
            )
        return replace(self, ids=ids, added=added)


def read_vocabulary(layout: Layout) -> Vocabulary:
    """Of tokenizer.json, and of the tensors that have a name for it and as many rows as config.json
    says.

    Raises:
        DeltaflError: one of these is missing, or a token's id is beyond the rows.
    """
    data = read_object(layout.folder / "tokenizer.json")
    try:
        plain, added = data["model"]["vocab"], {t["content"]: t for t in data["added_tokens"]}
        if isinstance(plain, list):  # with scores
            plain = {token: i for i, (token, _) in enumerate(plain)}
        ids = plain | {token: int(entry["id"]) for token, entry in added.items()}
    except (KeyError, TypeError, ValueError):
        raise DeltaflError(
            f'"{layout.ref}": has no tokenizer.json that can be read, by which to know its tokens; '
            "save its tokenizer there (transformers: save_pretrained)"
        ) from None
    rows = with_size(read_object(layout.folder / "config.json")).get("vocab_size", 0)
    named = [name for name in layout.entries if ROWS.fullmatch(name)]
    tensors = tuple(name for name in named if layout.entries[name].shape[:1] == (rows,))
    if not tensors:
        raise DeltaflError(
            f'"{layout.ref}": no embedding has as many rows as the vocab_size of its config.json '
            f"({rows}); mend that"
        )
    if beyond := [token for token, i in ids.items() if i >= rows]:
        raise DeltaflError(
            f'"{layout.ref}": token "{beyond[0]}" has the id {ids[beyond[0]]}, and "{tensors[0]}" '
            f"has {rows} rows; mend its tokenizer"
        )
    return Vocabulary(ids, added, tensors, rows)


def with_size(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that holds vocab_size."""
    return config if "vocab_size" in config else config.get("text_config", {})


def added_token(token: str) -> Mapping[str, Any]:
    """An entry of tokenizer.json: matched as it is, before text is split."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return {"content": token, **flags, "normalized": True}


def union(base: Vocabulary, *others: Vocabulary) -> Vocabulary:
    """The base's ids, then the others' plain tokens, then their added ones; each by their ids."""
    added = [entry for one in others for entry in one.added.values()]
    known = {entry["content"] for entry in added} | base.ids.keys()
    tokens = [token for one in others for token in sorted(one.ids, key=one.ids.__getitem__)]
    return base.extended([*(added_token(t) for t in tokens if t not in known), *added])


def write_vocabulary(vocabulary: Vocabulary, source: Path, folder: Path) -> None:
    """Bring a model's files to a vocabulary, after they were copied: the tokens added in
    tokenizer.json; in config.json vocab_size, and the ids of special tokens as `source` has them.
    """
    file = folder / "tokenizer.json"
    data, added = read_object(file), [*vocabulary.added.values()]
    if data["added_tokens"] != added:
        file.write_text(json.dumps(data | {"added_tokens": added}, ensure_ascii=False))
    file, theirs = folder / "config.json", read_object(source / "config.json")
    config = read_object(file)
    for part, their in ((with_size(config), with_size(theirs)), (config, theirs)):
        part |= {key: i for key, i in their.items() if key.endswith("_token_id")}
    with_size(config)["vocab_size"] = vocabulary.rows
    file.write_text(json.dumps(config, indent=2))
