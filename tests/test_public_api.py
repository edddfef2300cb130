"""What `import deltafl` promises."""

import subprocess
import sys

import deltafl

PUBLIC = [
    "Source", "TaskVector", "Update", "__version__", "aggregate", "cclip", "fedavg", "fedgma", "fednova", "median",
    "step", "task_arithmetic",
]  # fmt: skip


def test_the_public_names_are_these_and_no_more() -> None:
    assert sorted(deltafl.__all__) == PUBLIC
    assert dir(deltafl) == deltafl.__all__


def test_every_public_name_is_there_and_is_the_one_of_its_module() -> None:
    from deltafl.algebra import aggregate
    from deltafl.merge import task_vector
    from deltafl.rules import rule

    for name in PUBLIC:
        assert getattr(deltafl, name) is not None
    assert deltafl.TaskVector is task_vector.TaskVector
    assert deltafl.fednova is task_vector.fednova
    assert (deltafl.Update, deltafl.aggregate, deltafl.step) == (
        aggregate.Update, aggregate.aggregate, aggregate.step,
    )  # fmt: skip
    assert deltafl.Source is rule.Source


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    assert not hasattr(deltafl, "task_vector")


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, deltafl; print(*{'torch', 'numpy', 'transformers'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_a_star_import_gives_what_all_lists() -> None:
    held: dict[str, object] = {}
    exec("from deltafl import *", held)
    assert set(PUBLIC) <= set(held)
