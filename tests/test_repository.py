"""Laws about the repository itself: what it names, pins and promises."""

import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import deltafl
from checkpoint_files import python
from deltafl.algebra import aggregate
from deltafl.merge import modules, task_vector

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MOST_LINES = 340
HEAVY = {
    "torch",
    "transformers",
    "matplotlib",
    "datasets",
    "sklearn",
    "scipy",
    "accelerate",
    "pandas",
}

# Written with brackets so that this file does not match itself.
MACHINE = re.compile(r"(?<![\w.)}\"$-])/(wor[k]|roo[t]|op[t]|hom[e]|User[s])/\w")
REGISTRY = (
    r"py[p]i\.org|pythonhoste[d]|registry\.np[m]js|download\.py[t]orch|deb\.debia[n]|/simpl[e]\b"
)
REGISTRY = re.compile(REGISTRY)


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return []


@pytest.mark.parametrize("pattern", [MACHINE, REGISTRY], ids=["machine path", "package registry"])
def test_no_tracked_file_names_a(pattern: re.Pattern[str]) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in tracked()
        for number, line in enumerate(lines(path), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_a_machine_path_and_a_registry_are_recognised() -> None:
    assert all(MACHINE.search(text) for text in ("see /roo" + "t/x", "cd /wor" + "k/main"))
    assert all(
        REGISTRY.search(t) for t in ("https://py" + "pi.org", "a file:///x/simpl" + "e index")
    )


def test_modules_are_short() -> None:
    counts = {str(p.relative_to(ROOT)): len(lines(p)) for p in (ROOT / "src").rglob("*.py")}
    assert counts
    assert not {name: n for name, n in counts.items() if n > MOST_LINES}


def pins() -> dict[str, str]:
    """Canonical name -> version; every line is one exact pin."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        name, version = line.split("==")
        assert name == canonicalize_name(name), line
        assert name not in found, line
        assert "+" not in version, f"{line}: a local build cannot be had elsewhere"
        found[name] = version
    return found


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for, over every extra."""
    table = PROJECT["project"]
    asked = itertools.chain(table["dependencies"], *table["optional-dependencies"].values())
    return [r for r in map(Requirement, asked) if r.name != "deltafl"]


def test_every_requirement_is_pinned_within_its_range():
    held, asked = pins(), requirements()
    assert asked
    lacking = [str(r) for r in asked if canonicalize_name(r.name) not in held]
    assert not lacking, "they have no pin: run make pins"
    versions = {r: held[canonicalize_name(r.name)] for r in asked}
    assert not [f"{r}: {v}" for r, v in versions.items() if not r.specifier.contains(v)]


def closure(name: str, extras: frozenset[str], seen: set[tuple[str, str]]) -> Iterator[str]:
    """Names of all installed distributions that `name` needs on this machine, itself included."""
    yield name
    try:
        asked = [Requirement(r) for r in distribution(name).requires or ()]
    except PackageNotFoundError:
        return
    for requirement in asked:
        for extra in extras or {""}:
            below = canonicalize_name(requirement.name)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            if wanted and (below, extra) not in seen:
                seen.add((below, extra))
                yield from closure(below, frozenset(requirement.extras), seen)


def test_the_whole_closure_is_pinned() -> None:
    needed = set(closure("deltafl", frozenset({"", "test"}), set())) - {"deltafl", "setuptools"}
    # what a CUDA build of torch brings; a CPU build has none of it
    builds = ("nvidia-", "cuda-", "triton")
    loose = sorted(name for name in needed if name not in pins() and not name.startswith(builds))
    assert len(needed) > len(PROJECT["project"]["dependencies"])
    if sys.platform == "linux" and sys.version_info[:2] == (3, 11):  # where the pins were made
        assert not loose, f"run make pins: {loose}"


def test_uv_gets_the_same_pins() -> None:
    wanted = [f"{name}=={version}" for name, version in pins().items()]
    assert PROJECT["tool"]["uv"]["constraint-dependencies"] == wanted


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(path: Path) -> list[str]:
    """The lines of a document's fenced blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.S | re.M)
    return [line for block in blocks for line in block.split("\n")]


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    lines = "\n".join(line for path in documents() for line in commands(path))
    named = {*re.findall(r"^make ([a-z-]+)", lines, re.M)}
    assert {"quickstart", "test"} <= named
    assert named <= targets


def test_every_install_of_the_project_is_constrained() -> None:
    installs = [
        (path.name, line)
        for path in [*documents(), ROOT / "Makefile", ROOT / ".ci" / "run"]
        for line in path.read_text().splitlines()
        if re.search(r"pip install", line) and re.search(r" -e |INSTALL :=", line)
    ]
    assert len(installs) >= 3
    assert not [(name, line) for name, line in installs if "-c constraints.txt" not in line]


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    listed = "*{name.split('.')[0] for name in sys.modules}"
    done = python(f"{code}\nimport sys; print({listed}, file=sys.stderr)", check=True)
    return set(done.stderr.splitlines()[-1].split())


HELP = """
import sys
from deltafl.cli import main
sys.argv = ["deltafl", "--help"]
try:
    main()
except SystemExit as done:
    assert not done.code
"""


@pytest.mark.parametrize("code", ["import deltafl", HELP], ids=["import deltafl", "--help"])
def test_starts_without_heavy_imports(code: str) -> None:
    assert modules_after(code).isdisjoint(HEAVY)


PUBLIC = (
    "Source TaskVector Update __version__ aggregate cclip fedavg fedgma fednova median "
    "sequential_regression step task_arithmetic"
)


def test_the_public_names_are_these_and_no_more():
    assert sorted(deltafl.__all__) == PUBLIC.split()
    assert dir(deltafl) == deltafl.__all__
    assert not hasattr(deltafl, "task_vector")
    held: dict[str, object] = {}
    exec("from deltafl import *", held)
    homes = {**vars(modules), **vars(task_vector), **vars(aggregate)}
    assert all(held[name] is homes[name] for name in {*deltafl.__all__} - {"__version__"})
