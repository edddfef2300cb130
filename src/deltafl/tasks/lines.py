"""Language by lines of plain text: predict the next token, judge a line by its likelihood."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError
from deltafl.tasks.inputs import TextInput
from deltafl.tasks.selection import Selection, select
from deltafl.tasks.task import SPLITS, Batch, Model, Split, Task, hash_of

log = logging.getLogger(__name__)

IGNORED = -100
"""The label of what is not predicted: padding."""


@dataclass(frozen=True, eq=False)
class Lines:
    """The token ids of all lines end to end, int32 (T,), where each begins, int64 (N + 1,), and
    the source of each, int64 (N,).
    """

    tokens: Tensor
    starts: Tensor
    sources: Tensor

    def __len__(self) -> int:
        return len(self.sources)

    def at(self, rows: Tensor) -> "Lines":
        """Those at `rows`, int64."""
        return lines_of([self.line(i) for i in rows.tolist()], self.sources[rows])

    def line(self, row: int) -> Tensor:
        """Token ids of one line, int64."""
        return self.tokens[self.starts[row] : self.starts[row + 1]].long()


def lines_of(lines: Sequence[Tensor], sources: Tensor) -> Lines:
    """`Lines` of token ids line by line."""
    lengths = torch.tensor([0, *map(len, lines)])
    tokens = torch.cat([line.int() for line in lines] or [torch.empty(0, dtype=torch.int32)])
    return Lines(tokens, lengths.cumsum(0), sources)


@dataclass(frozen=True, eq=False)
class LineTask(Task):
    """Next-token cross-entropy; `model(input_ids=, attention_mask=).logits` is (B, T, V).

    A batch is {"input_ids", "attention_mask", "labels"}, int64 (B, T), padded on the right; labels
    are the ids, `IGNORED` at padding. Loss of a line: the sum over its tokens but the first; weight:
    their number. Score: the mean log-likelihood of these tokens, in nats, below 0.
    """

    name: str
    splits: Mapping[str, Lines]
    pad: int

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
        lines = [self.splits[split].line(i) for i in ids.tolist()]
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(lines, batch_first=True, padding_value=self.pad).to(device),
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
        return -sums / counts

    def sampled(self, model: Model, batch: Batch, generator: torch.Generator) -> Batch:
        """Each next token drawn from the model's distribution after the true ones before it."""
        chances = _logits(model, batch)[:, :-1].softmax(2).to(generator.device)
        drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=generator)
        labels = batch["labels"].clone()
        drawn = drawn.view_as(labels[:, 1:]).to(labels.device)
        labels[:, 1:] = torch.where(labels[:, 1:] == IGNORED, IGNORED, drawn)
        return {**batch, "labels": labels}

    def fingerprint(self) -> str:
        return hash_of(*(t for s in SPLITS for t in (self.splits[s].tokens, self.splits[s].starts)))

    def only(self, rows: Mapping[str, Tensor], name: str) -> "LineTask":
        if empty := [split for split in SPLITS if not len(rows[split])]:
            raise DeltaflError(f'task "{name}" has no line in {", ".join(empty)}; take fewer parts')
        return replace(self, name=name, splits={s: self.splits[s].at(rows[s]) for s in SPLITS})


def _logits(model: Model, batch: Batch) -> Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return model(input_ids=ids, attention_mask=mask).logits.float()


def load_lines(folder: Path, inputs: TextInput, selection: Selection) -> LineTask:
    """The task of a folder with `train*.txt`, `test*.txt` and perhaps `val*.txt`: a line an example.

    Each file is a source (see `groups`), counted by its name without the split: `train-news.txt` and
    `test-news.txt` are one. A line begins with the tokenizer's BOS token and ends with its EOS, where
    it has them; blank lines are left out, longer ones than the model takes are cut, both counted in
    the log. Val is held out of train where there is none.

    Raises:
        DeltaflError: no such folder or file, a file that is not UTF-8, a split without a line.
    """
    files = {s: sorted(folder.glob(f"{s}*.txt")) for s in SPLITS}
    if missing := [s for s in ("train", "test") if not files[s]]:
        raise DeltaflError(
            f'"{folder}" has no {missing[0]}*.txt; lines of text come from train*.txt and test*.txt'
        )
    names = sorted({p.stem.removeprefix(s) for s, paths in files.items() for p in paths})
    read = {s: _read(files[s], s, names, inputs) for s in SPLITS if files[s]}
    chosen = select({s: lines.sources.numpy() for s, lines in read.items()}, selection)
    splits: dict[str, Lines] = {
        s: read[origin].at(torch.from_numpy(rows)) for s, (origin, rows) in chosen.items()
    }
    pad = inputs.tokenizer.pad_token_id
    return LineTask(folder.name, splits, pad if isinstance(pad, int) else 0)


def _read(paths: Sequence[Path], split: Split, names: Sequence[str], inputs: TextInput) -> Lines:
    lines, sources, blank, cut = [], [], 0, 0
    first, last = inputs.tokenizer.bos_token_id, inputs.tokenizer.eos_token_id
    for path in paths:
        try:
            texts = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DeltaflError(f'"{path}" cannot be read as UTF-8 text: {error}') from error
        for text in texts:
            ids = inputs.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            ids = [*([] if first is None else [first]), *ids, *([] if last is None else [last])]
            if not text.strip() or len(ids) < 2:
                blank += 1
                continue
            cut += len(ids) > inputs.max_length
            lines.append(torch.tensor(ids[: inputs.max_length]))
            sources.append(names.index(path.stem.removeprefix(split)))
    if not lines:
        raise DeltaflError(f'"{paths[0].parent}": the {split} split has no line of text')
    if blank or cut:
        log.info("%s: %d blank lines left out, %d cut to %d tokens", paths[0].parent, blank, cut,
                 inputs.max_length)  # fmt: skip
    return lines_of(lines, torch.from_numpy(np.array(sources, dtype=np.int64)))
