"""Run program.py of the working directory, confined; `sandbox.passes` starts this as a script.

Arguments: a seccomp filter in hex; the most bytes of memory, seconds of processor time and bytes of
a file; the folders that may be read.
"""

import ctypes
import os
import resource
import struct
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

ENDED = 47
"""The exit status of a program that ran to its end; one that leaves early has its own, or 1."""

_SIGKILL, _PDEATHSIG, _SECCOMP, _NO_NEW_PRIVS = 9, 1, 22, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ, _OWN = 0b1100, 0b100_0001_0010_1110
"""Rights of Landlock: read files and folders; also write, cut, make and remove regular files."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_PRCTL, _SYSCALL = _LIBC.prctl, _LIBC.syscall
_PRCTL.argtypes = _SYSCALL.argtypes = [ctypes.c_long] + [ctypes.c_void_p] * 4


def confine(code: bytes, limits: Sequence[int], readable: Sequence[str]) -> None:
    """Forbid this process for good whatever `passes` says, before anything of the program is run.

    Raises:
        OSError: the kernel cannot.
    """
    memory, seconds, file_bytes = limits
    most = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in most.items():
        resource.setrlimit(kind, (value, value))
    _call(_PRCTL, _NO_NEW_PRIVS, 1)
    version = _call(_SYSCALL, _CREATE_RULESET, None, 0, 1)
    # Version 1 knows 13 rights, 2 one more, 3 the cutting of files: what is newer, seccomp forbids.
    handled = (1 << min(12 + version, 15)) - 1
    rules = _call(_SYSCALL, _CREATE_RULESET, struct.pack("Q", handled), 8, 0)
    for folder, rights in {**dict.fromkeys(readable, _READ), ".": _OWN}.items():
        place = os.open(folder, os.O_PATH)
        _call(_SYSCALL, _ADD_RULE, rules, 1, struct.pack("=Qi", rights & handled, place), 0)
        os.close(place)
    _call(_SYSCALL, _RESTRICT_SELF, rules, 0)
    os.close(rules)
    held = ctypes.create_string_buffer(code)
    _call(_PRCTL, _SECCOMP, 2, struct.pack("HP", len(code) // 8, ctypes.addressof(held)))


def _call(function: Callable[..., int], *arguments: int | bytes | None) -> int:
    result = function(*arguments, *[None] * (5 - len(arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno())
    return result


def main() -> None:
    """End with `ENDED`, or with 1 if the program raised anything, SystemExit included."""
    _call(_PRCTL, _PDEATHSIG, _SIGKILL)
    with open("program.py", "rb") as file:
        program = file.read()
    os.unlink("program.py")
    code, *limits = sys.argv[1:5]
    confine(bytes.fromhex(code), [*map(int, limits)], sys.argv[5:])
    sys.argv[1:] = []
    module = sys.modules["__main__"] = ModuleType("__main__")
    try:
        exec(compile(program, "program.py", "exec"), vars(module))
    except BaseException:
        os._exit(1)
    os._exit(ENDED)


if __name__ == "__main__":
    main()
