"""Instructions that a text can be checked against (IFEval, arXiv 2311.07911), as its authors'
program decides them (google-research/instruction_following_eval), strictly.

Deviations: sentences and capital words are found by the rules of ifeval.yaml, not by nltk; whether
a text in one case is English is not asked; a letter may be any character, where theirs replaces #
and ! by a random letter.
"""

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, TypeAlias

import yaml

Instruction: TypeAlias = tuple[str, Mapping[str, Any]]
"""Its name, and its settings."""

LANGUAGE = "language:response_language"
"""The one instruction that cannot be checked here: that takes langdetect, as lm-eval has it."""

RELATIONS = {"less than": operator.lt, "at least": operator.ge, "exactly": operator.eq}


def instructions(
    names: Sequence[str], settings: Sequence[Mapping[str, Any] | None]
) -> list[Instruction] | None:
    """Those of a row; None if one is of a language.

    Raises LookupError, TypeError or ValueError for an unknown instruction, or settings that do not
    go with it.
    """
    if LANGUAGE in names:
        return None
    given = [{k: v for k, v in (own or {}).items() if v is not None} for own in settings]
    wanted: list[Instruction] = [*zip(names, given, strict=False)]
    for one in wanted:
        _follows("...", *one)
    return wanted


def follows(wanted: Sequence[Instruction], text: str) -> float:
    """1 where a text, which says something, follows all instructions."""
    return float(bool(text.strip()) and all(_follows(text, *one) for one in wanted))


def _follows(text: str, name: str, settings: Mapping[str, Any]) -> bool:
    if name in CHECKS:
        return CHECKS[name](text, **settings)
    each = next((value for value in settings.values() if isinstance(value, list)), [None])
    return all(_matches(text, name, settings, own) for own in each)


def _matches(text: str, name: str, settings: Mapping[str, Any], own: object) -> bool:
    """Whether a text matches a rule; `own`: what stands for a list."""
    texts = {k: str(own if isinstance(v, list) else v).strip() for k, v in settings.items()}
    pattern, relation, number = rules()[name]
    escaped = {key: re.escape(value) for key, value in texts.items()}
    count = len(re.findall(pattern.format(**escaped), text))
    return RELATIONS[relation.format(**texts)](count, int(number.format(**texts)))


@cache
def rules() -> Mapping[str, Sequence[str]]:
    """Name of an instruction -> pattern, relation and number."""
    return yaml.safe_load((files("deltafl.tasks") / "ifeval.yaml").read_text(encoding="utf-8"))


def _parts(text: str, divider: str) -> list[str]:
    """What stands between dividers; nothing at either end is no part."""
    parts = [*map(str.strip, re.split(divider, text))]
    return parts[not parts[0] : len(parts) - (not parts[-1])]


def _two(text: str) -> bool:
    parts = _parts(text, r"\*{6}")
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = _parts(text, r"\s?\*\*\*\s?")
    return len(parts) == num_paragraphs and all(parts)


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = [*map(str.strip, text.split("\n\n"))]
    count, word = sum(map(bool, paragraphs)), re.escape(first_word)
    found = re.match(
        rf"(?i)'*\"*{word}(?:[.,?!'\"\s]|\Z)",
        "".join(paragraphs[nth_paragraph - 1 : nth_paragraph]),
    )
    return count == num_paragraphs and nth_paragraph <= count and found is not None


def _postscript(text: str, postscript_marker: str) -> bool:
    return bool(re.search(postscript_marker.strip().lower().replace(".", r"\.\s?"), text.lower()))


def _highlights(text: str, num_highlights: int) -> bool:
    found = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(one.strip("*").strip()) for one in found) >= num_highlights


def _is_json(text: str) -> bool:
    fences = r"\A\s*(?:```(?:json|Json|JSON)?)?|(?:```)?\s*\Z"
    try:
        json.loads(re.sub(fences, "", text))
    except ValueError:
        return False
    return True


CHECKS: Mapping[str, Callable[..., bool]] = {
    "change_case:english_capital": lambda text: text.isupper(),
    "change_case:english_lowercase": lambda text: text.islower(),
    "combination:two_responses": _two,
    "detectable_content:postscript": _postscript,
    "detectable_format:json_format": _is_json,
    "detectable_format:number_highlighted_sections": _highlights,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "length_constraints:number_paragraphs": _paragraphs,
}
"""Name of an instruction -> whether a text follows it, given its settings."""
