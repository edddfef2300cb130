"""Write what is installed in this environment into constraints.txt and pyproject.toml's [tool.uv] table.

Run by `make pins` after a deliberate upgrade, in an environment that holds every extra. Local builds ("+cpu") are
pinned by their public version, so that any build of the same release fits.
"""

import re
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOT_OURS = {"pip", "setuptools", "wheel", "deltafl"}
HEADER = (
    "# The tested versions of everything that deltafl installs, for every extra. `make pins` writes this file\n"
    "# and the same list in pyproject.toml, for uv. Every install command takes it, with -c.\n"
)


def canonical(name: str) -> str:
    """The normal form of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Pin every installed distribution."""
    found = {canonical(d.name): d.version.split("+")[0] for d in distributions()}
    skip = lambda name: name in NOT_OURS or name.startswith(("nvidia-", "cuda-", "triton"))  # noqa: E731
    pins = [f"{name}=={version}" for name, version in sorted(found.items()) if not skip(name)]
    (ROOT / "constraints.txt").write_text(HEADER + "\n".join(pins) + "\n")
    project = ROOT / "pyproject.toml"
    table = "constraint-dependencies = [\n" + "".join(f'  "{pin}",\n' for pin in pins) + "]"
    text, count = re.subn(
        r"constraint-dependencies = \[.*?\]", lambda _: table, project.read_text(), flags=re.S
    )
    if count != 1:
        raise SystemExit(
            "pyproject.toml has no single constraint-dependencies list under [tool.uv]"
        )
    project.write_text(text)
    print(f"{len(pins)} pins")


if __name__ == "__main__":
    main()
