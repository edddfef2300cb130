import sys

import pytest

from deltafl.errors import DeltaflError
from deltafl.tasks import load_task

CODE = """
import torch
from deltafl.tasks import Split, Task

def split(size, channels, n=8, dtype=torch.uint8, most=2):
    return Split(torch.zeros(n, channels, size, size, dtype=dtype), torch.arange(n) % most)

def good(image_size, channels, seed):
    import beside
    one = split(image_size, channels)
    return Task(f"mine{seed}{beside.X}", one, one, one, ("a", "b"))

def wrong_size(image_size, channels, seed):
    one = split(image_size + 1, channels)
    return Task("mine", one, one, one, ("a", "b"))

def wrong_labels(image_size, channels, seed):
    one = split(image_size, channels)
    return Task("mine", one, Split(one.images, one.labels.float()), one, ("a", "b"))

def outside(image_size, channels, seed):
    one = split(image_size, channels, most=3)
    return Task("mine", one, one, one, ("a", "b"))

def nothing(image_size, channels, seed):
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
    task = load_task("own_tasks:good", image_size=8, channels=1, seed=3)
    assert (task.name, tuple(task.train.images.shape)) == ("mine37", (8, 1, 8, 8))


def test_limit_holds_for_it_too():
    task = load_task("own_tasks:good", image_size=8, limit=4)
    assert [len(s) for s in (task.train, task.val, task.test)] == [4, 4, 4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "wrong_size",
            r'split train of data set "mine": images are torch.uint8 \(8, 3, 9, 9\), not .*\(N, 3, 8, 8\)',
        ),
        ("wrong_labels", "split val .*labels are torch.float32"),
        ("outside", "label of row 2 is 2, but there are 2 class names"),
        ("nothing", "returned a NoneType, not a"),
        ("goood", 'no function "goood"; did you mean "good"'),
    ],
)
def test_a_task_of_another_form_is_an_error(name, message):
    with pytest.raises(DeltaflError, match=message):
        load_task(f"own_tasks:{name}", image_size=8)


def test_an_import_that_fails_inside_the_users_module_is_theirs_to_see():
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load_task("needs_more:anything", image_size=8)
