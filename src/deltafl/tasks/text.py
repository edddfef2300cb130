"""Language: predict the tokens of an answer, be judged by their likelihood or by what is said."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError
from deltafl.tasks.inputs import TextInput
from deltafl.tasks.judges import Judge
from deltafl.tasks.task import SPLITS, Batch, Device, HeldTask, Model, Split, drawn, hash_of

IGNORED = -100
"""The label of what is not predicted: the prompt, and padding."""

AT_ONCE = 4096
"""Tokens that are scored at once, for the logits of a token are as many as there are words."""

WORST = -1e6
"""The score, in nats, of a text whose likelihood under a model is no finite number."""


@runtime_checkable
class Writer(Protocol):
    """A model that writes."""

    def write(self, prompts: Sequence[Tensor], most: int) -> list[Tensor]:
        """The token ids, int64, that follow each prompt, at most so many."""
        ...


@dataclass(frozen=True, eq=False)
class Texts:
    """Of each example the token ids, (T_i,), the first position that is answer, int64 (N,), its
    source, int64 (N,), and what it is judged by, if that is more, as JSON can hold it.
    """

    ids: Sequence[Tensor]
    starts: Tensor
    sources: Tensor
    facts: Sequence[Any] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, rows: Tensor) -> "Texts":
        """Those at `rows`, int64."""
        some = rows.tolist()
        facts = [self.facts[row] for row in some] if self.facts else ()
        return Texts([self.ids[row] for row in some], self.starts[rows], self.sources[rows], facts)


def padded(ids: Sequence[Tensor], starts: Tensor, device: Device) -> Batch:
    """{"input_ids", "attention_mask", "labels"}, int64 (B, T), padded on the right to the longest;
    labels are the ids, `IGNORED` before `starts`, int64 (B,), and at padding.
    """
    tokens = nn.utils.rnn.pad_sequence([*ids], batch_first=True, padding_value=IGNORED)
    tokens = tokens.to(device).long()
    mask = tokens != IGNORED
    asked = torch.arange(tokens.shape[1], device=device) < starts.to(device)[:, None]
    labels = tokens.masked_fill(asked, IGNORED)
    return {"input_ids": tokens * mask, "attention_mask": mask.long(), "labels": labels}


@dataclass(frozen=True, eq=False)
class TextTask(HeldTask):
    """Next-token cross-entropy; `model(input_ids=, attention_mask=).logits` is (B, T, V).

    A batch is what `padded` says, and {"rows"}, int64 (B,): 3 id + the number of the split. Loss
    of an example: the sum over the tokens of its answer, of a line over all but the first; weight:
    their number. Score: the mean log-likelihood of these tokens, in nats, below 0.
    """

    splits: Mapping[str, Texts]

    metric = "log-likelihood"
    ratio_scaled = False

    def groups(self, split: Split) -> Tensor:
        """The source of each example: the file of a line, or what a column says."""
        return self.splits[split].sources

    def lengths(self, split: Split) -> Tensor:
        return torch.tensor([*map(len, self.splits[split].ids)], dtype=torch.int64)

    def batch(
        self,
        split: Split,
        ids: Tensor,
        device: Device = "cpu",
        generator: torch.Generator | None = None,
    ) -> Batch:
        texts, rows = self.splits[split], ids.cpu()
        batch = padded([texts.ids[row] for row in rows.tolist()], texts.starts[rows], device)
        return {**batch, "rows": len(SPLITS) * ids.to(device) + SPLITS.index(split)}

    def told(self, batch: Batch) -> list[tuple[Tensor, Any]]:
        """Prompt, int64 (T,), and facts of each example of a batch."""
        found = []
        for place in batch["rows"].tolist():
            row, split = divmod(place, len(SPLITS))
            texts = self.splits[SPLITS[split]]
            found.append((texts.ids[row][: texts.starts[row]].long(), texts.facts[row]))
        return found

    def loss(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        logits = _logits(model, batch).flatten(0, 1)  # words last in memory: four times as fast
        losses = nn.functional.cross_entropy(
            logits, labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(labels)
        return losses.sum(1), (labels != IGNORED).sum(1).to(losses.dtype)

    def score(self, model: Model, batch: Batch) -> Tensor:
        count, length = batch["input_ids"].shape
        parts = torch.arange(count).split(max(1, AT_ONCE // length))
        found = [self.loss(model, {n: t[part] for n, t in batch.items()}) for part in parts]
        sums, counts = map(torch.cat, zip(*found, strict=True))
        return torch.nan_to_num(-sums / counts, nan=WORST, neginf=WORST)

    def sampled(self, model: Model, batch: Batch, generator: torch.Generator) -> Batch:
        """Each next token drawn from the model's distribution after the true ones before it."""
        targets = drawn(_logits(model, batch)[:, :-1].softmax(2), generator)
        first, labels = batch["labels"].tensor_split([1], dim=1)
        return {**batch, "labels": torch.cat([first, targets.where(labels != IGNORED, labels)], 1)}

    def fingerprint(self) -> str:
        texts = [self.splits[split] for split in SPLITS]
        lines = [line.long() for own in texts for line in own.ids]
        sizes = torch.tensor([*map(len, texts), *map(len, lines)])
        starts, facts = (own.starts for own in texts), repr([own.facts for own in texts])
        return hash_of(torch.cat(lines), sizes, *starts, facts)


def _logits(model: Model, batch: Batch) -> Tensor:
    """Of the token after each, float32 (B, T, V)."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return model(input_ids=ids, attention_mask=mask).logits.float()


@dataclass(frozen=True, eq=False)
class ChoiceTask(TextTask):
    """Score: 1 where of all choices the right one has the largest log-likelihood, else 0.

    Facts: the number of the right choice, and of each choice its first position and its ids.
    """

    metric = "accuracy"
    ratio_scaled = True

    def score(self, model: Model, batch: Batch) -> Tensor:
        device = batch["labels"].device
        return torch.stack([self._one(model, facts, device) for _, facts in self.told(batch)])

    def _one(self, model: Model, facts: Any, device: Device) -> Tensor:
        right, choices = facts
        starts, ids = zip(*choices, strict=True)
        whole = padded([*map(torch.tensor, ids)], torch.tensor(starts), device)
        return (self.loss(model, whole)[0].argmin() == right).float()


@dataclass(frozen=True, eq=False)
class WrittenTask(TextTask):
    """Score: what `judge` says of an example's facts and of the text, at most `most` tokens, that
    the model writes after its prompt.
    """

    inputs: TextInput
    judge: Judge
    most: int

    ratio_scaled = True

    def quick(self) -> "WrittenTask":
        return replace(self, most=1)

    @property
    def metric(self) -> str:
        return self.judge.metric

    def score(self, model: Model, batch: Batch) -> Tensor:
        if not isinstance(model, Writer):
            raise DeltaflError(
                f'task "{self.name}": {self.metric} is for models that write, causal language '
                "models of transformers; take score likelihood"
            )
        prompts, facts = zip(*self.told(batch), strict=True)
        written = zip(prompts, model.write(prompts, self.most), strict=True)
        texts = (self._text(torch.cat(both))[len(self._text(both[0])) :] for both in written)
        return torch.tensor([*map(self.judge.judge, facts, texts)], dtype=torch.float32)

    def _text(self, ids: Tensor) -> str:
        return str(self.inputs.tokenizer.decode(ids.tolist(), skip_special_tokens=True))
