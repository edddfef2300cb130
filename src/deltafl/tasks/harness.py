"""Tasks of lm-eval, EleutherAI's harness, asked and judged by its own code of the live model."""

import copy
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.inputs import TextInput
from deltafl.tasks.selection import select
from deltafl.tasks.task import SPLITS, Batch, Device, Model, Split, Task, hash_of

log = logging.getLogger(__name__)

FEWSHOT_SEED = 1234
"""lm-eval's own, by which the examples before a question are drawn."""


Theirs: TypeAlias = Any
"""An object of lm-eval, which need not be installed."""


@runtime_checkable
class Holder(Protocol):
    """A model around a module."""

    module: nn.Module


@dataclass(frozen=True, eq=False)
class HarnessTask(Task):
    """A task of lm-eval, `given`, that judges only: no example is for training, and a loss is 0.

    A batch is {"rows": int64 (B,)}, places in `requests`, which holds what lm-eval asks of a model
    about each example; `rows` says which are in a split. Score: the metric called `metric` after
    the task's first filter, negative where smaller is better; over a split of the task, its mean
    is lm-eval's number.
    """

    name: str
    given: Theirs
    inputs: TextInput
    requests: Sequence[Sequence[Theirs]]
    rows: Mapping[Split, Tensor]
    metric: str
    ratio_scaled: bool

    def size(self, split: Split) -> int:
        return len(self.rows[split])

    def batch(
        self,
        split: Split,
        ids: Tensor,
        device: Device = "cpu",
        generator: torch.Generator | None = None,
    ) -> Batch:
        return {"rows": self.rows[split][ids.cpu()].to(device)}

    def loss(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros(len(batch["rows"]))
        return nothing, nothing + 1

    def score(self, model: Model, batch: Batch) -> Tensor:
        module = model.module if isinstance(model, Holder) else model
        if not isinstance(module, import_module("transformers").PreTrainedModel):
            raise DeltaflError(
                f'task "{self.name}" of lm-eval is for causal language models of transformers'
            )
        if not len(batch["rows"]):
            return torch.empty(0)
        examples = [
            [replace(request, resps=[], filtered_resps={}) for request in self.requests[row]]
            for row in batch["rows"].tolist()
        ]
        asked = [*chain(*examples)]
        lm = import_module("lm_eval.models.huggingface").HFLM(
            pretrained=module, tokenizer=self.inputs.tokenizer, batch_size=len(examples)
        )
        ask = {"loglikelihood": lm.loglikelihood, "generate_until": lm.generate_until}
        answers = ask[asked[0].request_type](asked, disable_tqdm=True)
        for request, answer in zip(asked, answers, strict=True):
            request.resps.append(answer)
        self.given._instances = asked
        self.given.apply_filters()
        found = []
        for own in examples:
            answers = [next(iter(request.filtered_resps.values())) for request in own]
            found.append(float(self.given.process_results(own[0].doc, answers)[self.metric]))
        return torch.tensor(found) * (1 if self.ratio_scaled else -1)

    def fingerprint(self) -> str:
        asked = [[request.doc, request.arguments] for request in chain(*self.requests)]
        about = json.dumps([self.name, self.metric, version("lm_eval"), asked], default=str)
        return hash_of(about, *self.rows.values())

    def only(self, rows: Mapping[str, Tensor], name: str) -> "HarnessTask":
        return replace(self, name=name, rows={s: self.rows[s][rows[s]] for s in SPLITS})


def load_harness(target: str, inputs: TextInput, val_fraction: float, seed: int) -> HarnessTask:
    """The task of lm-eval called `target`, or of the file FILE.yaml.

    Test and val are the task's own. Where it has only one of them, val_fraction of that is val, by
    `seed`, and the rest test. Prompts are as lm-eval makes them, without a chat template.

    Raises:
        DeltaflError: lm-eval is not installed, no such task, one that cannot be loaded (offline),
            or whose score is no mean over examples, is drawn, or runs programs.
    """
    where = f'data "harness:{target}"'
    if find_spec("lm_eval") is None:
        raise DeltaflError(f'{where} needs lm-eval; pip install "deltafl[harness]"')
    import_module("datasets").disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks, file = import_module("lm_eval.tasks"), target.endswith(".yaml")
    manager = tasks.TaskManager(include_defaults=not file)
    if not file and target not in (known := manager.all_subtasks):
        raise DeltaflError(
            f"{where}: lm-eval has no single task of that name; {did_you_mean(target, known)}"
        )
    try:
        (given,) = manager.load(target)["tasks"].values()
        asked = _asked(given, given.validation_docs()), _asked(given, given.test_docs())
    except Exception as error:  # the hub, readers of files, a task's own code raise many kinds
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DeltaflError(f"{where} cannot be loaded: {line}") from error
    metric = _metric(given, where)
    val, test = torch.arange(sum(map(len, asked))).split([*map(len, asked)])
    if not all(asked):
        alike = {"train": np.zeros(len(val) + len(test)), "test": np.empty(0)}
        chosen = select(alike, seed, val_fraction)
        val, test = (torch.from_numpy(chosen[part][1]) for part in ("val", "train"))
        told = "%s has one split: %d of its examples, drawn by the seed, are val, %d test"
        log.warning(told, where, len(val), len(test))
    rows: dict[Split, Tensor] = {"train": val[:0], "val": val, "test": test}
    inputs = replace(inputs, tokenizer=copy.deepcopy(inputs.tokenizer))  # HFLM changes it
    higher = given.higher_is_better()[metric]
    every = [*chain(*asked)]
    return HarnessTask(given.task_name, given, inputs, every, rows, metric, higher)


def _asked(given: Theirs, docs: Iterable[Theirs] | None) -> list[list[Theirs]]:
    """What is asked about each example, as `Task.build_all_requests` of lm-eval makes it."""
    given.set_fewshot_seed(FEWSHOT_SEED)
    found = []
    for doc in docs or ():
        shots, prefix = given.config.num_fewshot or 0, given.doc_to_prefix(doc)
        context = given.fewshot_context(doc, num_fewshot=shots, gen_prefix=prefix)
        made = given.construct_requests(doc=doc, ctx=context, metadata=(None, 0, 1))
        found.append(made if isinstance(made, list) else [made])
    return found


def _metric(given: Theirs, where: str) -> str:
    """The task's first score that is a mean over examples."""
    config, scores = given.config, given.aggregation()
    if config.unsafe_code:
        raise DeltaflError(
            f"{where} runs programs of the model unconfined; take our humaneval or mbpp"
        )
    if config.repeats > 1 or (config.generation_kwargs or {}).get("do_sample"):
        raise DeltaflError(f"{where} draws what a model writes, and a score must come again")
    mean = import_module("lm_eval.api.metrics").mean
    if metric := next((name for name, how in scores.items() if how is mean), None):
        return metric
    raise DeltaflError(f"{where} has no score that is a mean over examples: {', '.join(scores)}")
