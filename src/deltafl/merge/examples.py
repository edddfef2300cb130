"""Merges of checkpoints by examples of their tasks: the models that run, the update they give."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from safetensors.torch import save

from deltafl.algebra.deltas import Difference
from deltafl.algebra.tensors import Joined, Lazy, Tensors, device_named
from deltafl.checkpoints.adapter import read_adapter
from deltafl.checkpoints.layout import fingerprint
from deltafl.errors import DeltaflError, attempt
from deltafl.files import atomic_folder, check_output, write_atomically
from deltafl.merge.gradients import fisher_information, learn, merge_fisher
from deltafl.merge.inputs import Opened, open_updates
from deltafl.merge.layerwise import (
    Client,
    Evidence,
    Examples,
    Start,
    Statistics,
    maps_of,
    merge_layerwise,
)
from deltafl.merge.plan import Facts, Plan, plan_merge
from deltafl.merge.reading import read_model
from deltafl.merge.recipe import KINDS, MergeRecipe, ModelEntry, StatisticsRecipe
from deltafl.merge.run import VERSIONS, run_merge
from deltafl.merge.statistics import FOLDER, NOTE, PART, read_statistics
from deltafl.models import HEAD_FILE, HeadRecipe, Net, load_net
from deltafl.progress import OnProgress, Progress, ignore
from deltafl.rules.fisher import Fisher
from deltafl.rules.learned import Learned
from deltafl.rules.regmean import RegMean
from deltafl.rules.rule import ExampleRule, LayerRule
from deltafl.rules.task_arithmetic import TaskArithmetic
from deltafl.rules.weights import shares
from deltafl.tasks import DataRecipe, Task, load_task
from deltafl.tasks.recipe import DataSource
from deltafl.tasks.task import hash_of


def example_update(
    rule: ExampleRule,
    opened: Opened,
    known: Sequence[Callable[[Tensors, float], Evidence]],
    on_progress: OnProgress = ignore,
    state: Path | None = None,
) -> tuple[Lazy, Facts]:
    """R of a rule that needs examples, at scale 1, in the precision of `opened`; and its report.

    known: of the models, in their order, what beside tensors and weight there is to know; their
    nets share their tensors, whose values may change.

    Raises:
        DeltaflError: a negative weight, too few examples, a task that a model cannot do.
    """
    base, weights = opened.base, opened.weights["*"]
    if min(weights) < 0:
        raise DeltaflError(f"{rule.name}: weights must not be negative, not {min(weights):g}")
    mean = opened.aggregate(TaskArithmetic())
    start = Start(base, mean, base.dtype)
    parts = zip(known, opened.tuned.values(), shares(weights), strict=True)
    some = [make(tuned, p) for make, tuned, p in parts if p]
    report: dict[str, object] = {"examples": rule.examples}
    if isinstance(rule, Fisher):
        merged = merge_fisher(rule, start, some, on_progress)
    elif isinstance(rule, Learned):
        examples = [one for one in some if isinstance(one, Examples)]
        merged, factors = learn(rule, start, examples, on_progress)
        report["coefficients"] = dict(zip(merged, factors.tolist(), strict=True))
    else:
        assert isinstance(rule, LayerRule)
        merged, found = merge_layerwise(rule, start, some, on_progress, state)
        report |= found
    wanted = {name: tensor for name, tensor in merged.items() if name in mean}
    delta = Difference(base, wanted, base.dtype)
    return Joined({name: (delta if name in delta else mean, name) for name in mean}), report


def load_tasks(
    plan: Plan,
    entries: Sequence[ModelEntry],
    net: Net,
    data_dir: str | None,
    seed: int | None = None,
) -> list[Task]:
    """The task of each model; seed None: with the validation split that its training held out.

    Raises:
        DeltaflError: a model without a task, or one that cannot be read.
    """
    tasks, problems = list[Task](), list[str]()
    for (name, trained), entry in zip(plan.training.items(), entries, strict=True):
        if entry.data is None:
            line = f'model "{name}": {plan.recipe.method} needs its task; name it with --tasks'
            problems.append(line)
            continue
        source = entry.model_dump(include={*DataSource.model_fields})
        data = DataRecipe.of(**source, data_dir=data_dir)
        own = trained.seed or 0 if seed is None else seed
        if task := attempt(problems, load_task, data, net.inputs, own):
            tasks.append(task)
    if problems:
        raise DeltaflError(*problems)
    return tasks


def nets_for(net: Net, tasks: Sequence[Task], heads: Sequence[HeadRecipe]) -> list[Net]:
    """For each task a net with its head; all share the tensors of `net`.

    Raises:
        DeltaflError: heads or tasks do not fit the model.
    """
    nets, problems = [net.sharing() for _ in tasks], list[str]()
    for one, task, head in zip(nets, tasks, heads, strict=True):
        attempt(problems, one.prepare, task, head)
    if problems:
        raise DeltaflError(*problems)
    return nets


def load_nets(plan: Plan) -> tuple[list[Net], list[Task]]:
    """The base as a net for each model, with the model's head, and the models' tasks.

    Raises:
        DeltaflError: as `load_tasks` and `nets_for`.
    """
    recipe, net = plan.recipe, load_net(plan.recipe.base)
    net.module.eval().float().to(device_named(recipe.device))
    tasks = load_tasks(plan, [*recipe.entries.values()], net, recipe.data_dir)
    files = [layout.folder / HEAD_FILE for layout in plan.layouts.values()]
    heads = [HeadRecipe.of(head=str(f)) if f.is_file() else HeadRecipe.of() for f in files]
    return nets_for(net, tasks, heads), tasks


def merge_by_examples(
    plan: Plan, out: str | Path, *, overwrite: bool = False, on_progress: OnProgress = ignore
) -> Facts:
    """`run_merge` by a rule that needs examples of the models' tasks, or statistics of them, which
    are taken where no model has a task.

    The maps that a `LayerRule` has solved are kept in OUT.layers until the merge is written; after
    a kill the same merge goes on from there, to the same bits.

    Raises:
        DeltaflError: as `run_merge`, `example_update` and `read_statistics`.
    """
    recipe, rule, out = plan.recipe, plan.rule.core, Path(out)
    assert isinstance(rule, ExampleRule)
    if rule.name in KINDS and all(entry.data is None for entry in recipe.entries.values()):
        found = [*read_statistics(plan)]
        known = [partial(Statistics, files) for _, files in found]
        notes = [note.model_dump(include={"task", "examples", "seed"}) for note, _ in found]
        nets, prints, told = [], [repr(found)], {"statistics": notes}
        rule = replace(rule, examples=min(note["examples"] for note in notes))
    else:
        nets, tasks = load_nets(plan)
        known = [partial(Examples, *pair) for pair in zip(nets, tasks, strict=True)]
        prints, told = [task.fingerprint() for task in tasks], {}
    prints += [fingerprint(layout) for layout in plan.inputs]
    key = hash_of(repr(recipe.content()), *prints)
    state = out.with_name(f"{out.name}.layers")

    def make(opened: Opened) -> tuple[Lazy, Facts]:
        if isinstance(rule, LayerRule) and nets:
            nets[0].empty(opened.base)
        update, report = example_update(rule, opened, known, on_progress, state / key[:16])
        return update, report | told

    record = run_merge(plan, out, overwrite=overwrite, on_progress=on_progress, make=make)
    shutil.rmtree(state, ignore_errors=True)
    return record


def write_statistics(recipe: StatisticsRecipe, on_progress: OnProgress = ignore) -> Path:
    """Run a model once and write the folder of a recipe, whole or not at all; returns it.

    Grams are float64: rounded to float32 they moved a merged ViT by 6e-5 of its largest weights.

    Raises:
        DeltaflError: bad input; the folder exists.
    """
    layout = read_model(recipe.model)
    adapter = read_adapter(layout)
    base = adapter.base if adapter else recipe.model
    itself = {"base": base, "models": (recipe.model,), "tasks": (recipe.task,)}
    plan = plan_merge(MergeRecipe.of(**itself, device=recipe.device, allow_other_base=True))
    if recipe.out is None and layout.revision:
        raise DeltaflError(f'model "{recipe.model}" is no folder here; name one with --out')
    out = Path(recipe.out or layout.folder / FOLDER / recipe.kind)
    plan.refuse_as_output(out)
    check_output(out, overwrite=recipe.overwrite)
    (net,), (task,) = load_nets(plan)
    opened = open_updates(plan)
    start = Start(opened.base, opened.base, opened.base.dtype)
    examples = Examples(net, task, *opened.tuned.values(), weight=1.0)
    if recipe.kind == "fisher":
        found = fisher_information(Fisher(recipe.examples, recipe.seed), start, examples)
        names, tensors = dict.fromkeys(found), found.values()
    else:
        maps = maps_of(start, examples)
        client = Client(examples, start, RegMean(recipe.examples, recipe.seed), maps)
        names, tensors = {m.weight: m.bias for m in maps}, client.grams(maps)
    note = recipe.content() | {
        "model": fingerprint(layout),
        "task": task.name,
        "tensors": names,
        "versions": VERSIONS,
    }
    with atomic_folder(out, overwrite=recipe.overwrite) as folder:
        for number, (name, tensor) in enumerate(zip(names, tensors, strict=True), 1):
            write_atomically(folder / PART.format(number), save({name: tensor}))
            on_progress(Progress("statistics", number, len(names)))
        write_atomically(folder / NOTE, json.dumps(note, indent=2).encode())
    return out
