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
from deltafl.tasks.inputs import TextInput
from deltafl.tasks.judges import JUDGES
from deltafl.tasks.prompts import Prompts
from deltafl.tasks.recipe import DataRecipe, TextSource
from deltafl.tasks.sandbox import check_allowed
from deltafl.tasks.selection import select
from deltafl.tasks.text import ChoiceTask, Texts, TextTask, WrittenTask

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

log = logging.getLogger(__name__)

DEFAULTS = {
    "prompt": "prompt",
    "response": "response",
    "choices": "choices",
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

        about, flat = [], []
        for split, table, first, where in _divided(open_tables(source, scratch), source, rows):
            examples, counts = prompts.tokens([*prompts.examples(table, first, where)])
            told = "".join(f"; {count} {what}" for what, count in counts.items() if count)
            if not examples:
                raise DeltaflError(f"{where} has no example to learn from or to judge{told}")
            flat += [np.asarray(ids, "int32") for ids, *_ in examples]
            kept_rows = [(len(ids), *rest) for ids, *rest in examples]
            about.append([split, f"{where}: {len(examples)} kept{told}", bool(told), kept_rows])
        tokens = np.concatenate(flat)
        return Made(about, tokens.shape, [tokens], "int32")

    made_of = [source.key, how.content(), rows, prompts.most, _stamp(inputs)]
    about, tokens = kept([made_of, version("transformers")], make)
    every = iter(tokens.split([size for *_, examples in about for size, *_ in examples]))
    names = sorted({name for *_, examples in about for _, _, name, _ in examples})
    read = dict[str, Texts]()
    for split, told, warned, examples in about:
        log.log(logging.WARNING if warned else logging.INFO, told)
        _, starts, sources, facts = zip(*examples, strict=True)
        codes = torch.tensor([names.index(name) for name in sources])
        ids = [*islice(every, len(examples))]
        read[split] = Texts(ids, torch.tensor(starts), codes, facts)
    splits = _selected(read, recipe.val_fraction or HELD_OUT, seed)
    if how.score == "choice":
        return ChoiceTask(source.name, splits)
    if judge := JUDGES.get(how.score or ""):
        return WrittenTask(source.name, splits, inputs, judge, how.max_new_tokens or 0)
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
    known = named.model_dump(include=fields, exclude_unset=True) if named else {}
    how = TextSource.of(**DEFAULTS | known | said)
    if how.score == "pass@1":
        check_allowed(how.allow_code_execution, f'task "{source.name}"')
        if "{answer}" not in (how.program or ""):
            raise DeltaflError(
                "pass@1 needs a program, a template of columns with {answer} where the code goes; "
                "give --program (program)"
            )
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
    if not known.keys() & {"train", "test"}:
        raise DeltaflError(f"{source.where} has neither a train nor a test split")
    for split, key in known.items():
        files = source.files.get(key, ())
        where = f'"{files[0]}"' if len(files) == 1 else f'split "{key}" of {source.where}'
        parts = {} if "test" in known else rows
        for part, (first, last) in parts.items():
            some = range(first, min(last + 1, len(tables[key])))
            yield part, tables[key].select(some), first, f"{where} ({part})"
        if not parts:
            yield split, tables[key], 0, where


def _selected(read: dict[str, Texts], fraction: float, seed: int) -> Mapping[str, Texts]:
    """Train, val and test; where there is a test split only, the others are empty."""
    none = torch.empty(0, dtype=torch.int64)
    if "test" in read:
        read.setdefault("train", read["test"].at(none))
    else:
        whole = read["train"]
        read |= {"test": whole.at(none)}
        read |= {"train": (parts := _held_out(read, fraction, 0))["train"], "test": parts["val"]}
    return _held_out(read, fraction, seed)


def _held_out(read: Mapping[str, Texts], fraction: float, seed: int) -> dict[str, Texts]:
    """The splits, with val out of train where there is none."""
    alike = {split: np.zeros(len(own)) for split, own in read.items()}
    chosen = select(alike, seed, fraction)
    return {s: read[origin].at(torch.from_numpy(rows)) for s, (origin, rows) in chosen.items()}
