"""Language by lines of plain text."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.tasks.inputs import TextInput
from deltafl.tasks.selection import select
from deltafl.tasks.task import SPLITS
from deltafl.tasks.text import Texts, TextTask

log = logging.getLogger(__name__)


def tokenised(texts: Sequence[str], inputs: TextInput) -> list[Tensor]:
    """The token ids of each line of text, int64, with the tokenizer's BOS token before and its EOS
    after where it has them.

    Blank ones are left out, and those longer than the model takes are cut; both are counted in the
    log.
    """
    (first, last), most = ends(inputs), inputs.max_length
    given = encoded([*filter(str.strip, texts)], inputs)
    lines = [line for ids in given if len(line := [*first, *ids, *last]) > 1]
    cut = sum(len(line) > most for line in lines)
    log.info("%d lines, %d left out, %d cut", len(lines), len(texts) - len(lines), cut)
    return [torch.tensor(line[:most]) for line in lines]


def ends(inputs: TextInput) -> list[list[int]]:
    """The tokenizer's BOS token and its EOS, each none where it has none."""
    tokens = inputs.tokenizer.bos_token_id, inputs.tokenizer.eos_token_id
    return [[token] if isinstance(token, int) else [] for token in tokens]


def encoded(texts: Sequence[str], inputs: TextInput) -> list[list[int]]:
    """The token ids of each text, and no others."""
    if not texts:
        return []
    return inputs.tokenizer([*texts], add_special_tokens=False, verbose=False).input_ids


def load_lines(data: str, inputs: TextInput, val_fraction: float, seed: int) -> TextTask:
    """The task of a folder, `lines:FOLDER` or FOLDER, with `train*.txt`, `test*.txt` and perhaps
    `val*.txt`: a line an example.

    Each file is a source (see `groups`), known by its name without the split: `train-news.txt` and
    `test-news.txt` are one. Val is held out of train where there is none.

    Raises:
        DeltaflError: no such folder or file, a file that is not UTF-8, a split without a line.
    """
    folder, read = Path(data.removeprefix("lines:")).expanduser(), dict[str, Texts]()
    files = {split: sorted(folder.glob(f"{split}*.txt")) for split in SPLITS}
    names = sorted({p.stem.removeprefix(s) for s, paths in files.items() for p in paths})
    for split, paths in files.items():
        lines, sources = [], []
        for path in paths:
            try:
                texts = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DeltaflError(f'"{path}" cannot be read as UTF-8 text: {error}') from error
            lines += tokenised(texts, inputs)
            source = names.index(path.stem.removeprefix(split))
            sources += [source] * (len(lines) - len(sources))
        if lines:
            sources = torch.tensor(sources)
            read[split] = Texts(lines, torch.ones_like(sources), sources)
        elif paths or split != "val":
            raise DeltaflError(
                f'data "{data}" has no line of text in {folder / split}*.txt, and the model takes '
                "text; name a folder with train*.txt and test*.txt"
            )
    chosen = select({s: lines.sources.numpy() for s, lines in read.items()}, seed, val_fraction)
    splits = {s: read[origin].at(torch.from_numpy(rows)) for s, (origin, rows) in chosen.items()}
    return TextTask(folder.resolve().name, splits)
