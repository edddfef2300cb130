"""Tasks of text from tables: tokens out of the cache, splits, and what they are judged by."""

import logging
from collections.abc import Iterator, Mapping
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch

from deltafl.errors import DeltaflError
from deltafl.tasks.cache import Made, kept
from deltafl.tasks.catalogue import NamedText, text_catalogue
from deltafl.tasks.find import SPLIT_NAMES, Found
from deltafl.tasks.ifeval import CAN_TELL_LANGUAGES
from deltafl.tasks.inputs import TextInput
from deltafl.tasks.judges import JUDGES
from deltafl.tasks.prompts import Prompts
from deltafl.tasks.recipe import DataRecipe, TextSource
from deltafl.tasks.sandbox import check_allowed
from deltafl.tasks.selection import MOST_HELD_OUT, select, stratified
from deltafl.tasks.text import ChoiceTask, Texts, TextTask, WrittenTask

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

log = logging.getLogger(__name__)

DEFAULTS = {
    "prompt": "prompt",
    "response": "response",
    "choices": "choices",
    "program": "program",
    "score": "likelihood",
    "template": "auto",
    "max_new_tokens": 256,
}

HELD_OUT = 0.05
"""The part of train that is validation, or test, where the data have none and nothing is said."""


def load_text(source: Found, recipe: DataRecipe, inputs: TextInput, seed: int) -> TextTask:
    """The task of tables; its tokens are cached in `$DELTAFL_CACHE`, or `~/.cache/deltafl`.

    Left out are examples without an answer, unless what a model writes is judged, and those whose
    prompt leaves no room: for a token of the answer, all of each choice, or all that may be
    written. Longer answers are cut. All are counted in the log. Where there is no test split the
    catalogue's rows divide the data; else val_fraction of train is test, in every run the same.

    Raises:
        DeltaflError: whatever is wrong with the settings, the data or the cache, in one line.
    """
    how, rows = _settings(source, recipe)
    prompts = Prompts(how, inputs, *_room(how, inputs))

    def make(scratch: Path) -> Made:
        from deltafl.tasks.tables import open_tables

        about, flat = [], [np.empty(0, "int32")]
        for split, table, first, where in _divided(open_tables(source, scratch), source, rows):
            made = prompts.tokens([*prompts.examples(table, first, where)])
            flat += [np.asarray(ids, "int32") for ids in made.ids]
            about.append([split, where, [*map(len, made.ids)], *made[1:]])
        tokens = np.concatenate(flat)
        return Made(about, tokens.shape, [tokens], "int32")

    made_of = [source.key, how.content(), rows, prompts.most, _stamp(inputs), CAN_TELL_LANGUAGES]
    about, tokens = kept([made_of, version("transformers")], make)
    names = sorted({name for part in about for name in part[4]})
    read, every = dict[str, Texts](), iter(tokens.split([n for part in about for n in part[2]]))
    for split, where, sizes, starts, sources, facts, counts in about:
        told = "".join(f"; {count} {what}" for what, count in counts.items() if count)
        log.log(logging.WARNING if told else logging.INFO, "%s: %d kept%s", where, len(sizes), told)
        if not sizes:
            raise DeltaflError(f"{where} has no example to learn from or to judge{told}")
        codes = torch.tensor([names.index(name) for name in sources])
        read[split] = Texts([*islice(every, len(sizes))], torch.tensor(starts), codes, facts)
    splits = _selected(read, recipe.val_fraction or HELD_OUT, seed, source.where)
    if how.score == "choice":
        return ChoiceTask(source.name, splits)
    if judge := JUDGES.get(how.score or ""):
        most = how.max_new_tokens or 0
        return WrittenTask(source.name, splits, inputs, judge, most)
    return TextTask(source.name, splits)


def _settings(source: Found, recipe: DataRecipe) -> tuple[TextSource, Mapping[str, list[int]]]:
    """What to read of the data: as is said, else as the catalogue says, else by default; and the
    catalogue's rows.
    """
    named = (
        source.named if isinstance(source.named, NamedText) else text_catalogue().get(source.name)
    )
    fields = {*TextSource.model_fields}
    said = recipe.model_dump(include=fields, exclude_none=True)
    known = named.model_dump(include=fields, exclude_none=True) if named else {}
    known |= {"allow_code_execution": False}
    how = TextSource.of(**DEFAULTS | known | said)
    if how.score == "pass@1":
        check_allowed(how.allow_code_execution, f'task "{source.name}"')
    return how, named.rows if named else {}


def _room(how: TextSource, inputs: TextInput) -> tuple[int, int]:
    """Tokens of an example, at most, and of its prompt."""
    most = how.max_length or inputs.max_length
    written = (how.max_new_tokens or 0) if how.score in JUDGES else 1
    if most > inputs.max_length:
        raise DeltaflError(f"max_length {most} is more than the model takes, {inputs.max_length}")
    if written >= most:
        raise DeltaflError(
            f"max_new_tokens {written} leaves no room for a prompt in the {most} tokens that the "
            "model takes; give fewer"
        )
    if how.template == "chat" and not inputs.tokenizer.chat_template:
        raise DeltaflError(
            "the model's tokenizer has no chat template; give --template plain (template), or add "
            "chat_template.jinja to the model's folder"
        )
    return most, most - written


def _stamp(inputs: TextInput) -> str:
    """A hash of all that the tokenizer is."""
    with TemporaryDirectory() as folder:
        inputs.tokenizer.save_pretrained(folder)
        return sha256(b"".join(p.read_bytes() for p in sorted(Path(folder).glob("*")))).hexdigest()


def _divided(
    tables: "DatasetDict", source: Found, rows: Mapping[str, list[int]]
) -> "Iterator[tuple[str, Dataset, int, str]]":
    """Our name of each split, its table, the number of its first row and its place in errors."""
    known = {SPLIT_NAMES[key]: key for key in map(str, tables) if key in SPLIT_NAMES}
    for split, key in known.items():
        files = source.files.get(key, ())
        where = f'"{files[0]}"' if len(files) == 1 else f'split "{key}" of {source.where}'
        parts = {} if "test" in known else rows
        if parts and (last := max(map(max, parts.values()))) >= len(tables[key]):
            raise DeltaflError(
                f'{where} has {len(tables[key])} rows, the "{source.name}" of the catalogue has '
                f"{last + 1} or more; complete it, or rename a set that is another"
            )
        for part, (first, last) in parts.items():
            yield part, tables[key].select(range(first, last + 1)), first, f"{where} ({part})"
        if not parts:
            yield split, tables[key], 0, where


def _selected(
    read: dict[str, Texts], fraction: float, seed: int, where: str
) -> Mapping[str, Texts]:
    """Train, val and test; of data with a test split only, the others are empty."""
    none = torch.empty(0, dtype=torch.int64)
    if "test" not in read:
        if "train" not in read:
            raise DeltaflError(f"{where} has neither a train nor a test split")
        whole, rng = read["train"], np.random.default_rng(0)
        count = max(1, min(round(fraction * len(whole)), MOST_HELD_OUT))
        held = stratified(np.zeros(len(whole)), count, rng, leave=1)
        rest = np.setdiff1d(np.arange(len(whole)), held)
        read |= {
            "train": whole.at(torch.from_numpy(rest)),
            "test": whole.at(torch.from_numpy(held)),
        }
    read.setdefault("train", read["test"].at(none))
    alike = {split: np.zeros(len(own)) for split, own in read.items()}
    chosen = select(alike, seed, fraction)
    return {s: read[origin].at(torch.from_numpy(rows)) for s, (origin, rows) in chosen.items()}
