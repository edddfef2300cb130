"""Programs that a model wrote, each in a process of its own that can do nothing but compute."""

import os
import platform
import struct
import sys
import time
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from subprocess import DEVNULL, Popen
from tempfile import TemporaryDirectory

import yaml

from deltafl.errors import DeltaflError

ENDED = 47
"""The exit status of a program that ran to its end; one that leaves early has its own, or 1."""

_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Machine -> its name in the kernel's audit.h, in the order of the columns of syscalls.yaml."""

_ONLY = {
    "ioctl": (1, 0xFFFFFFFF, [0x5451]),
    "openat": (2, os.O_TRUNC | os.O_ACCMODE, [0, 1, 2, os.O_TRUNC | 1, os.O_TRUNC | 2]),
}
"""Calls of which one argument, under a mask, must have one of these values: to close a file when a
program begins; to cut no file that is only read, which Landlock before Linux 6.2 would let pass.
"""


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds of processor time, and five times as many by the clock; bytes of
    memory; files, and bytes of one.
    """

    seconds: int = 10
    memory: int = 1 << 30
    files: int = 16
    file_bytes: int = 1 << 20


LIMITS = Limits()


def passes(program: str, limits: Limits = LIMITS) -> bool:
    """Whether a Python program runs to its end, within its limits and without an exception.

    It has one process with one thread, Python's standard library, an empty environment and an empty
    directory that is removed. It reads and writes no other file, opens no socket, starts, signals
    and traces no process; what it prints is lost. To leave early, with whatever status, is to fail.

    Raises:
        DeltaflError: this machine cannot confine a program.
    """
    check_confinement()
    return _status(program, limits) == ENDED


def check_allowed(allowed: bool, what: str) -> None:
    """Raise DeltaflError unless programs that a model writes may be run, and can be confined.

    what: the beginning of the line, such as `task "mbpp"`.
    """
    if not allowed:
        raise DeltaflError(
            f"{what} is judged by running programs that the model writes, each confined; allow "
            "that with --allow-code-execution (data.allow_code_execution: true)"
        )
    check_confinement()


@cache
def check_confinement() -> None:
    """Raise DeltaflError where a program cannot be confined."""
    if (
        sys.platform != "linux"
        or platform.machine() not in _MACHINES
        or _status("", LIMITS) != ENDED
    ):
        raise DeltaflError(
            "this machine cannot confine the programs that a model writes, so none is run: that "
            "takes Linux 5.13 or newer on x86_64 or aarch64, with Landlock and seccomp allowed"
        )


def _status(program: str, limits: Limits) -> int:
    """The exit status of a confined program; negative: the signal that ended it."""
    lib = (f"{top}/{lib}" for top in (sys.base_prefix, "", "/usr") for lib in ("lib", "lib64"))
    readable = filter(os.path.isdir, [os.path.dirname(os.__file__), *lib])
    script = str(Path(__file__).with_name("confined.py"))
    numbers = map(str, (ENDED, limits.memory, limits.seconds, limits.file_bytes))
    code = _filter(platform.machine()).hex()
    with TemporaryDirectory(prefix="deltafl-") as folder:
        Path(folder, "program.py").write_bytes(program.encode(errors="replace"))
        process = Popen(
            [sys.executable, "-BPSs", script, *numbers, code, *readable],
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},
        )
        try:
            last = time.monotonic() + 5 * limits.seconds
            while process.poll() is None:
                if time.monotonic() > last or len(os.listdir(folder)) > limits.files:
                    process.kill()
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
        return process.returncode


@cache
def _filter(machine: str) -> bytes:
    """A program for seccomp: calls of syscalls.yaml are done, others are not there (ENOSYS)."""
    load, same, both, end = 0x20, 0x15, 0x54, 0x06
    allow, refuse, kill = ((end, 0, 0, verdict) for verdict in (0x7FFF0000, 0x50026, 0x80000000))
    table = yaml.safe_load((files("deltafl.tasks") / "syscalls.yaml").read_text(encoding="utf-8"))
    column = [*_MACHINES].index(machine)
    steps = [(load, 0, 0, 4), (same, 1, 0, _MACHINES[machine]), kill, (load, 0, 0, 0)]
    for name, numbers in table.items():
        then = [allow]
        if name in _ONLY:
            place, mask, values = _ONLY[name]
            then = [step for value in values for step in ((same, 0, 1, value), allow)]
            then = [(load, 0, 0, 16 + 8 * place), (both, 0, 0, mask), *then, refuse]
        if numbers[column] >= 0:
            steps += [(same, 0, len(then), numbers[column]), *then]
    return b"".join(struct.pack("HBBI", *step) for step in [*steps, refuse])
