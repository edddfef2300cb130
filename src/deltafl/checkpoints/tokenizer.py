"""What belongs to a language model's text: files, and in what those of two models differ."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from deltafl.errors import DeltaflError, did_you_mean

TEXT = re.compile(
    r"(tokenizer|chat_template|vocab|spiece).*|merges\.txt|special_tokens_map\.json"
    r"|added_tokens\.json|generation_config\.json|.*\.(model|tiktoken)"
)
"""Names of the files that make and read text, beside the weights."""

CONFIG, JINJA = "tokenizer_config.json", "chat_template.jinja"

TEMPLATES = files("deltafl") / "templates" / "chat"


def text_files(folder: Path) -> list[Path]:
    """What makes and reads the text of a model."""
    return [file for file in folder.iterdir() if file.is_file() and TEXT.fullmatch(file.name)]


def text_differences(folder: Path, other: Path) -> list[str]:
    """In what another model's text differs from ours, of what it says."""
    ours, theirs = _facts(folder), _facts(other)
    return [what for what, told in theirs.items() if (ours.get(what) or None) != (told or None)]


def _facts(folder: Path) -> dict[str, object]:
    facts = dict[str, object]()
    config, template = read_object(folder / CONFIG), _template(folder)
    if config or template:
        facts["chat template"] = template
        tokens = {k: [v] for k, v in config.items() if k.endswith("_token") and v}
        more = (config.get(f"{kind}_special_tokens") or () for kind in ("additional", "extra"))
        tokens["more"] = [token for some in more for token in some]
        facts["special tokens"] = {k: [*map(_content, v)] for k, v in tokens.items() if v}
    if generation := read_object(folder / "generation_config.json"):
        about = ("transformers_version", "_from_model_config")
        facts["generation config"] = {k: v for k, v in generation.items() if k not in about}
    return facts


def _template(folder: Path) -> object:
    """The chat template of a model, if it has one."""
    file = folder / JINJA
    inside = read_object(folder / CONFIG).get("chat_template")
    return file.read_text() if file.is_file() else inside


def chat_template(wanted: str | None, folders: Iterable[Path]) -> str | None:
    """The chat template of a name, or as it is given: text in which there is a brace.

    auto: the most frequent one of the models, the first of several; none where no model has one.
    Raises DeltaflError.
    """
    if wanted is None or "{" in wanted:
        return wanted
    if wanted == "auto":
        held = [found for folder in folders if isinstance(found := _template(folder), str)]
        return next((one for one, _ in Counter(map(str.strip, held)).most_common(1)), None)
    known = {Path(file.name).stem: file for file in TEMPLATES.iterdir()}
    if wanted not in known:
        raise DeltaflError(f'chat_template: unknown "{wanted}"; {did_you_mean(wanted, known)}')
    return known[wanted].read_text()


def write_template(template: str, folder: Path) -> None:
    """Put a chat template in the place of a model's."""
    (folder / JINJA).write_text(template)
    config = read_object(folder / CONFIG)
    if config.pop("chat_template", None):
        (folder / CONFIG).write_text(json.dumps(config, indent=2))


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty without one. Raises DeltaflError."""
    try:
        return {**json.loads(file.read_text())} if file.is_file() else {}
    except (ValueError, TypeError):
        raise DeltaflError(f'"{file}" is not a JSON object; mend or remove it') from None
