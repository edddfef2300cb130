import sys

import pytest
from dataset_files import load, sizes

from checkpoint_files import fails

CODE = """
import torch
from deltafl.tasks import Images, ImageTask

def task(inputs, n=8, dtype=torch.uint8, most=2, name="mine", labels=torch.int64):
    shape = (n, inputs.channels, inputs.image_size, inputs.image_size)
    part = Images(torch.zeros(shape, dtype=dtype), (torch.arange(n) % most).to(labels))
    return ImageTask(name, {"train": part, "val": part, "test": part}, ("a", "b"))

def good(inputs, seed):
    import beside
    return task(inputs, name=f"mine{seed}{beside.X}")

def floats(inputs, seed):
    return task(inputs, dtype=torch.float32)

def wrong_labels(inputs, seed):
    return task(inputs, labels=torch.float32)

def outside(inputs, seed):
    return task(inputs, most=3)

def empty(inputs, seed):
    return task(inputs, n=0)

def no_test(inputs, seed):
    good = task(inputs)
    return ImageTask("mine", {"train": good.splits["train"], "val": good.splits["val"]}, ("a", "b"))

def nothing(inputs, seed):
    return None

def old(image_size, channels, seed):
    return None
"""


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "own_tasks.py").write_text(CODE)
    (tmp_path / "beside.py").write_text("X = 7")
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield
    assert sys.path == path
    for name in ("own_tasks", "beside", "needs_more"):
        sys.modules.pop(name, None)


def test_a_function_in_the_working_directory_gives_the_task():
    task = load("own_tasks:good", channels=1, seed=3)
    assert (task.name, tuple(task.splits["train"].images.shape)) == ("mine37", (8, 1, 8, 8))
    assert sizes(load("own_tasks:good", limit=4)) == [4, 4, 4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("floats", 'split train of task "mine" must be Images of uint8'),
        ("wrong_labels", "split train .* must be Images of uint8"),
        ("outside", "label of row 2 is 2, but there are 2 class names"),
        ("empty", 'split train of task "mine" is empty'),
        ("no_test", 'split test of task "mine" must be Images'),
        ("nothing", r"returned NoneType, not a deltafl.tasks.Task; return ImageTask\(name,"),
        ("old", r"is called with \(inputs, seed\); inputs has image_size and channels"),
        ("goood", 'cannot be imported: .*"?goood'),
        ("needs_more:anything", "not_installed_anywhere"),  # the import inside the module fails
    ],
)
def test_a_task_of_another_form_is_an_error(name, message):
    fails(message, load, name if ":" in name else f"own_tasks:{name}")
