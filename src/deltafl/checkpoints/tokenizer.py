"""What belongs to a language model's text: files, and in what those of two models differ."""

import json
import re
from pathlib import Path
from typing import Any

from deltafl.errors import DeltaflError

TEXT = re.compile(
    r"(tokenizer|chat_template|vocab|spiece).*|merges\.txt|special_tokens_map\.json"
    r"|added_tokens\.json|generation_config\.json|.*\.(model|tiktoken)"
)
"""Names of the files that make and read text, beside the weights."""


def text_files(folder: Path) -> list[Path]:
    """What makes and reads the text of a model."""
    return [file for file in folder.iterdir() if file.is_file() and TEXT.fullmatch(file.name)]


def text_differences(folder: Path, other: Path) -> list[str]:
    """In what another model's text differs from ours, of what it says."""
    ours, theirs = _facts(folder), _facts(other)
    return [what for what, told in theirs.items() if (ours.get(what) or None) != (told or None)]


def _facts(folder: Path) -> dict[str, object]:
    facts = dict[str, object]()
    file, config = folder / "chat_template.jinja", _read(folder / "tokenizer_config.json")
    if config or file.is_file():
        inside = config.get("chat_template")
        facts["chat template"] = file.read_text() if file.is_file() else inside
        tokens = {k: [v] for k, v in config.items() if k.endswith("_token") and v}
        more = (config.get(f"{kind}_special_tokens") or () for kind in ("additional", "extra"))
        tokens["more"] = [token for some in more for token in some]
        facts["special tokens"] = {k: [*map(_content, v)] for k, v in tokens.items() if v}
    if generation := _read(folder / "generation_config.json"):
        about = ("transformers_version", "_from_model_config")
        facts["generation config"] = {k: v for k, v in generation.items() if k not in about}
    return facts


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def _read(file: Path) -> dict[str, Any]:
    try:
        return {**json.loads(file.read_text())} if file.is_file() else {}
    except (ValueError, TypeError):
        raise DeltaflError(f'"{file}" is not a JSON object; mend or remove it') from None
