"""Language by lines of plain text: predict the next token, judge a line by its likelihood."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError
from deltafl.tasks.inputs import TextInput
from deltafl.tasks.selection import select
from deltafl.tasks.task import SPLITS, Batch, Device, HeldTask, Model, Split, drawn, hash_of

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


def tokenised(texts: Sequence[str], inputs: TextInput) -> list[Tensor]:
    """The token ids of each line of text, int64, with the tokenizer's BOS token before and its EOS
    after where it has them.

    Blank ones are left out, and those longer than the model takes are cut; both are counted in the
    log.
    """
    tokenizer, most = inputs.tokenizer, inputs.max_length
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id
    first, last = ([token] if isinstance(token, int) else [] for token in ends)
    given = [*filter(str.strip, texts)]
    encoded = tokenizer(given, add_special_tokens=False, verbose=False).input_ids if given else ()
    lines = [line for ids in encoded if len(line := [*first, *ids, *last]) > 1]
    cut = sum(len(line) > most for line in lines)
    log.info("%d lines, %d left out, %d cut", len(lines), len(texts) - len(lines), cut)
    return [torch.tensor(line[:most]) for line in lines]


@dataclass(frozen=True, eq=False)
class LineTask(HeldTask):
    """Next-token cross-entropy; `model(input_ids=, attention_mask=).logits` is (B, T, V).

    A batch is {"input_ids", "attention_mask", "labels"}, int64 (B, T), padded on the right; labels
    are the ids, `IGNORED` at padding. Loss of a line: the sum over its tokens but the first;
    weight: their number. Score: the mean log-likelihood of these tokens, in nats, below 0.
    """

    splits: Mapping[str, Lines]

    metric = "log-likelihood"
    ratio_scaled = False

    def groups(self, split: Split) -> Tensor:
        """The file that each line is from."""
        return self.splits[split].sources

    def batch(
        self,
        split: Split,
        ids: Tensor,
        device: Device = "cpu",
        generator: torch.Generator | None = None,
    ) -> Batch:
        lines = [self.splits[split].ids[row] for row in ids.tolist()]
        labels = nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=IGNORED)
        labels = labels.to(device)
        mask = (labels != IGNORED).long()
        return {"input_ids": labels * mask, "attention_mask": mask, "labels": labels}

    def loss(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch["labels"][:, 1:]
        losses = nn.functional.cross_entropy(
            _logits(model, batch).transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        return losses.sum(1), (labels != IGNORED).sum(1).to(losses.dtype)

    def score(self, model: Model, batch: Batch) -> Tensor:
        sums, counts = self.loss(model, batch)
        return torch.nan_to_num(-sums / counts, nan=WORST, neginf=WORST)

    def sampled(self, model: Model, batch: Batch, generator: torch.Generator) -> Batch:
        """Each next token drawn from the model's distribution after the true ones before it."""
        targets = drawn(_logits(model, batch).softmax(2), generator)
        first, labels = batch["labels"].tensor_split([1], dim=1)
        return {**batch, "labels": torch.cat([first, targets.where(labels != IGNORED, labels)], 1)}

    def fingerprint(self) -> str:
        lines = [line for split in SPLITS for line in self.splits[split].ids]
        sizes = [*map(self.size, SPLITS), *map(len, lines)]
        return hash_of(torch.cat(lines), torch.tensor(sizes))


def _logits(model: Model, batch: Batch) -> Tensor:
    """Of the tokens after the first, float32 (B, T - 1, V)."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()


def load_lines(data: str, inputs: TextInput, val_fraction: float, seed: int) -> LineTask:
    """The task of a folder, `lines:FOLDER` or FOLDER, with `train*.txt`, `test*.txt` and perhaps
    `val*.txt`: a line an example.

    Each file is a source (see `groups`), known by its name without the split: `train-news.txt` and
    `test-news.txt` are one. Val is held out of train where there is none.

    Raises:
        DeltaflError: no such folder or file, a file that is not UTF-8, a split without a line.
    """
    folder, read = Path(data.removeprefix("lines:")).expanduser(), dict[str, Lines]()
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
            read[split] = Lines(lines, torch.tensor(sources))
        elif paths or split != "val":
            raise DeltaflError(
                f'data "{data}" has no line of text in {folder / split}*.txt, and the model takes '
                "text; name a folder with train*.txt and test*.txt"
            )
    chosen = select({s: lines.sources.numpy() for s, lines in read.items()}, seed, val_fraction)
    splits = {s: read[origin].at(torch.from_numpy(rows)) for s, (origin, rows) in chosen.items()}
    return LineTask(folder.resolve().name, splits)
