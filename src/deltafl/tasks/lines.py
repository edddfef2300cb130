"""Language by lines of plain text: predict the next token, judge a line by its likelihood."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError
from deltafl.tasks.inputs import TextInput
from deltafl.tasks.recipe import DataRecipe
from deltafl.tasks.selection import select
from deltafl.tasks.task import SPLITS, Batch, Model, Split, Task, hash_of

log = logging.getLogger(__name__)

IGNORED = -100
"""The label of what is not predicted: padding."""

WORST = -1e6
"""The score, in nats, of a line whose likelihood under a model is no finite number."""


@dataclass(frozen=True, eq=False)
class Lines:
    """The token ids of each line, int64 (T_i,) with T_i >= 2, and its source, int64 (N,)."""

    ids: Sequence[Tensor]
    sources: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, rows: Tensor) -> "Lines":
        """Those at `rows`, int64."""
        return Lines([self.ids[row] for row in rows.tolist()], self.sources[rows])


def tokenised(texts: Sequence[str], inputs: TextInput, sources: Sequence[int] = ()) -> Lines:
    """Lines of text, with the tokenizer's BOS token before and its EOS after each where it has them.

    Blank ones are left out, and those longer than the model takes are cut; both are counted in the
    log. sources: where each line is from; all from one place by default.
    """
    tokenizer, kept, ids = inputs.tokenizer, [], []
    first, last = (
        [] if token is None else [token]
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    for row, (text, tokens) in enumerate(zip(texts, encoded, strict=True)):
        line = torch.tensor([*first, *tokens, *last], dtype=torch.int64)
        if text.strip() and len(line) > 1:
            kept.append(row)
            ids.append(line[: inputs.max_length])
    cut = sum(len(encoded[row]) + len(first) + len(last) > inputs.max_length for row in kept)
    if cut or len(kept) < len(texts):
        blank = len(texts) - len(kept)
        log.info("%d blank lines left out, %d cut to %d tokens", blank, cut, inputs.max_length)
    return Lines(ids, torch.tensor(sources or [0] * len(texts))[kept])


@dataclass(frozen=True, eq=False)
class LineTask(Task):
    """Next-token cross-entropy; `model(input_ids=, attention_mask=).logits` is (B, T, V).

    A batch is {"input_ids", "attention_mask", "labels"}, int64 (B, T), padded on the right; labels
    are the ids, `IGNORED` at padding. Loss of a line: the sum over its tokens but the first; weight:
    their number. Score: the mean log-likelihood of these tokens, in nats, below 0.
    """

    name: str
    splits: Mapping[str, Lines]

    metric = "log-likelihood"
    ratio_scaled = False

    def size(self, split: Split) -> int:
        return len(self.splits[split])

    def groups(self, split: Split) -> Tensor:
        """The file that each line is from."""
        return self.splits[split].sources

    def batch(
        self,
        split: Split,
        ids: Tensor,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> Batch:
        lines = [self.splits[split].ids[row] for row in ids.tolist()]
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(lines, batch_first=True).to(device),
            "attention_mask": pad([torch.ones_like(x) for x in lines], batch_first=True).to(device),
            "labels": pad(lines, batch_first=True, padding_value=IGNORED).to(device),
        }

    def loss(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, labels = _logits(model, batch)[:, :-1], batch["labels"][:, 1:]
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        return losses.sum(1), (labels != IGNORED).sum(1).to(losses.dtype)

    def score(self, model: Model, batch: Batch) -> Tensor:
        sums, counts = self.loss(model, batch)
        return torch.nan_to_num(-sums / counts, nan=WORST, neginf=WORST)

    def sampled(self, model: Model, batch: Batch, generator: torch.Generator) -> Batch:
        """Each next token drawn from the model's distribution after the true ones before it."""
        chances = _logits(model, batch)[:, :-1].softmax(2).to(generator.device)
        drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=generator)
        labels = batch["labels"].clone()
        drawn = drawn.view_as(labels[:, 1:]).to(labels.device)
        labels[:, 1:] = torch.where(labels[:, 1:] == IGNORED, IGNORED, drawn)
        return {**batch, "labels": labels}

    def fingerprint(self) -> str:
        lines = [line for split in SPLITS for line in self.splits[split].ids]
        sizes = [*(self.size(split) for split in SPLITS), *map(len, lines)]
        return hash_of(torch.cat(lines), torch.tensor(sizes))

    def only(self, rows: Mapping[str, Tensor], name: str) -> "LineTask":
        if empty := [split for split in SPLITS if not len(rows[split])]:
            raise DeltaflError(f'task "{name}" has no line in {", ".join(empty)}; take fewer parts')
        return replace(self, name=name, splits={s: self.splits[s].at(rows[s]) for s in SPLITS})


def _logits(model: Model, batch: Batch) -> Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return model(input_ids=ids, attention_mask=mask).logits.float()


def load_lines(folder: Path, inputs: TextInput, recipe: DataRecipe, seed: int) -> LineTask:
    """The task of a folder with `train*.txt`, `test*.txt` and perhaps `val*.txt`: a line an example.

    Each file is a source (see `groups`), known by its name without the split: `train-news.txt` and
    `test-news.txt` are one. Val is held out of train where there is none.

    Raises:
        DeltaflError: no such folder or file, a file that is not UTF-8, a split without a line.
    """
    files = {split: sorted(folder.glob(f"{split}*.txt")) for split in SPLITS}
    if missing := [split for split in ("train", "test") if not files[split]]:
        raise DeltaflError(
            f'"{folder}" has no {missing[0]}*.txt; lines of text come from train*.txt and test*.txt'
        )
    names = sorted({p.stem.removeprefix(s) for s, paths in files.items() for p in paths})
    read: dict[str, Lines] = {}
    for split in (split for split in SPLITS if files[split]):
        texts, sources = [], []
        for path in files[split]:
            lines = _lines(path)
            texts += lines
            sources += [names.index(path.stem.removeprefix(split))] * len(lines)
        read[split] = tokenised(texts, inputs, sources)
        if not len(read[split]):
            raise DeltaflError(f'"{folder}": the {split} split has no line of text')
    labels = {split: lines.sources.numpy() for split, lines in read.items()}
    chosen = select(labels, seed, recipe.val_fraction, recipe.limit)
    splits = {s: read[origin].at(torch.from_numpy(rows)) for s, (origin, rows) in chosen.items()}
    return LineTask(folder.resolve().name, splits)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaflError(f'"{path}" cannot be read as UTF-8 text: {error}') from error
