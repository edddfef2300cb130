"""What every test gets: no network, a cache of its own, and a reason where a marker's need is not met."""

import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports huggingface_hub or deltafl: both read the environment once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Before anything imports torch: some tests fork, which OpenMP's threads do not outlive, and pytest has the other cores.
os.environ["OMP_NUM_THREADS"] = "1"
_CACHE = tempfile.mkdtemp(prefix="deltafl-tests-")
os.environ["DELTAFL_CACHE"] = _CACHE

# No law depends on how fast the machine is; under CI the same examples come every time.
settings.register_profile(
    "deltafl",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("deltafl")

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@cache
def _realdata_lacks() -> str | None:
    folder = os.environ.get("DELTAFL_REALDATA")
    if not folder:
        return "DELTAFL_REALDATA is not set (the folder that holds data/ and weights/)"
    if not (Path(folder) / "data").is_dir():
        raise pytest.UsageError(
            f"DELTAFL_REALDATA={folder} holds no folder data/; correct it or unset it"
        )
    return None


def _chromium() -> str | None:
    return next((path for name in CHROMIUMS if (path := shutil.which(name))), None)


@cache
def _browser_lacks() -> str | None:
    return None if _chromium() else "no Chromium on the PATH"


@cache
def _gpu_lacks() -> str | None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old or absent driver warns here
        return None if torch.cuda.is_available() else "no CUDA device"


LACKS: dict[str, Callable[[], str | None]] = {
    "realdata": _realdata_lacks,
    "browser": _browser_lacks,
    "gpu": _gpu_lacks,
}
"""Marker -> why a test that carries it cannot run here, or None."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker, lacks in LACKS.items():
            if item.get_closest_marker(marker) and (reason := lacks()):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup() -> None:
    """What a test draws without a seed of its own is the same each time, and unlike what any seeded test draws."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(2411_18607)


@pytest.fixture
def realdata() -> Path:
    """The folder that holds data/ and weights/. A test that takes it is skipped where there is none."""
    if reason := _realdata_lacks():
        pytest.skip(reason)
    return Path(os.environ["DELTAFL_REALDATA"])


@pytest.fixture
def smollm2(realdata: Path) -> Path:
    """SmolLM2-135M-Instruct, as the folder's own program makes it."""
    folder = realdata / "models" / "smollm2-135m"
    if not folder.is_dir():
        pytest.skip(f"python {folder.parent}/prepare.py smollm2-135m {folder} was not run")
    return folder


@pytest.fixture
def chromium() -> str:
    """The path of a Chromium, for tests of the marker `browser`."""
    return _chromium() or ""


@pytest.fixture
def world(tmp_path: Path):
    """A base and two fine-tunes on disk."""
    from checkpoint_files import make_world

    return make_world(tmp_path)


@pytest.fixture
def language(tmp_path: Path):
    """A tiny Llama, and lines of two sources."""
    from deltafl.tasks import load_task
    from tiny_models import tiny_llama, write_lines

    net = tiny_llama(tmp_path / "llama")
    return net, load_task(str(write_lines(tmp_path / "lines")), net.inputs)
