"""What a task of a user's own is told, and what the two kinds of task promise."""

from dataclasses import dataclass, field

import pytest
import torch
from dataset_files import load, sizes

from checkpoint_files import fails
from deltafl.tasks import Task, load_task
from deltafl.tasks.lines import tokenised
from deltafl.tasks.recipe import DataRecipe, TrainingDataRecipe
from deltafl.tasks.task import check_task
from deltafl.tasks.text import WORST

N = 5


@dataclass
class Wrong(Task):
    """A task right in all but what is replaced."""

    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    name = "mine"

    def size(self, split):
        return N

    def groups(self, split):
        return self.replaced.get("groups", torch.zeros(N, dtype=torch.int64))

    def batch(self, split, ids, device="cpu", generator=None):
        return {"x": self.replaced.get("x", torch.zeros(len(ids), 3))}

    def loss(self, model, batch):
        ones = torch.ones(len(batch["x"]))
        return self.replaced.get("sums", ones), self.replaced.get("weights", ones)

    def score(self, model, batch):
        return self.replaced.get("score", torch.zeros(len(batch["x"])))

    def fingerprint(self):
        return ""


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sums", torch.ones(2, 3), r"the sums of loss must be float \(2,\).*\(2, 3\)"),
        ("sums", torch.tensor([1.0, NAN]), r"the sums of loss is not finite: \[1.0, nan\]"),
        ("weights", torch.ones(2, dtype=torch.int64), "the weights of loss must be float"),
        ("score", torch.tensor(0.5), r"score must be float \(2,\)"),
        ("score", torch.tensor([0.0, -INF]), "score is not finite"),
        ("groups", torch.zeros(N - 1), "groups.train., .*groups.test. must hold one row"),
        ("x", torch.zeros(3, 2), "batch.x. must hold one row for each example"),
    ],
)
def test_a_field_that_breaks_its_promise_is_named(name, value, message):
    check_task(Wrong(), lambda batch: batch)
    fails(f'task "mine": {message}', lambda: check_task(Wrong({name: value}), lambda batch: batch))


def test_some_rows_are_a_task_with_the_head_of_the_whole():
    whole = load("digits", channels=1)
    rows = {split: torch.arange(1, whole.size(split), 2) for split in ("train", "val", "test")}
    part = whole.only(rows, "part")
    assert part.name == "part"
    assert part.class_names == whole.class_names
    for split, keep in rows.items():
        assert torch.equal(part.groups(split), whole.groups(split)[keep])
        assert torch.equal(part.splits[split].images, whole.splits[split].images[keep])
    fails('task "none" has no example in val', whole.only, rows | {"val": torch.arange(0)}, "none")


@pytest.fixture
def text(language, tmp_path):
    return language[0], tmp_path / "lines"


@pytest.mark.parametrize("prefix", ["", "lines:"])
def test_lines_are_found_by_themselves_or_by_name(text, prefix):
    net, folder = text
    task = load_task(f"{prefix}{folder}", net.inputs)
    again = load_task(DataRecipe.of(data=f"{prefix}{folder}", limit=4), net.inputs)
    assert (task.metric, task.ratio_scaled) == ("log-likelihood", False)
    assert task.groups("train").unique().tolist() == [0, 1]  # the file that a line is from
    assert max(sizes(again)) == 4
    assert task.fingerprint() != again.fingerprint()
    rows = {split: torch.tensor([0]) for split in ("train", "val", "test")}
    assert [*sizes(task.only(rows, "one line"))] == [1, 1, 1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("digits", 'data "digits" holds images, and the model takes text'),
        ("cifar100", 'data "cifar100" holds images, and the model takes text'),
        ("lines:nowhere", r'"lines:nowhere" has no line of text in nowhere/train\*.txt'),
    ],
)
def test_what_is_no_text_is_one_line(text, data, message):
    fails(message, load_task, data, text[0].inputs)


def test_lines_are_cut_blank_ones_left_out_and_other_files_and_models_refused(text):
    net, folder = text
    lines = tokenised(["a line", "", "  ", "x" * 5000], net.inputs)
    assert [len(line) for line in lines] == [7, net.inputs.max_length]
    fails("holds text, and the model takes images", load, f"lines:{folder}")
    recipe = TrainingDataRecipe.of(data=str(folder), augment="flip")
    fails("augment and label_smoothing are for images", load_task, recipe, net.inputs)
    (folder / "test-bad.txt").write_bytes(b"\xff\xfe\xfa")
    fails(r'test-bad\.txt" cannot be read as UTF-8', load_task, str(folder), net.inputs)


def test_labels_are_drawn_from_the_model_and_one_that_gives_no_number_scores_worst(text):
    net, folder = text
    task = load_task(str(folder), net.inputs)
    batch = task.batch("train", torch.arange(4))
    with torch.no_grad():
        drawn = task.sampled(net, batch, torch.Generator().manual_seed(0))
    assert torch.equal(drawn["labels"] == -100, batch["labels"] == -100)
    assert torch.equal(drawn["labels"][:, 0], batch["labels"][:, 0])
    assert torch.equal(drawn["input_ids"], batch["input_ids"])
    assert not torch.equal(drawn["labels"], batch["labels"])
    with torch.no_grad():
        net.flat.fill_(float("nan"))
        assert task.score(net, batch).tolist() == [WORST] * 4
