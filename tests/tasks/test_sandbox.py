"""What a model's program must not do, it cannot; what it may do, it can."""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deltafl.errors import DeltaflError
from deltafl.forking import can_fork, fork
from deltafl.tasks import sandbox
from deltafl.tasks.sandbox import Limits, check_allowed, check_confinement, passes

try:
    check_confinement()
except DeltaflError as error:
    pytest.skip(str(error), allow_module_level=True)

ATTEMPT = """
import ctypes, os, signal, socket, subprocess, sys, threading, time
try:
    {attack}
except (OSError, RuntimeError, MemoryError) as error:
    refused = True
else:
    refused = False
assert refused
"""

BOMB = """
children = []
try:
    for _ in range(200):
        child = os.fork()
        if not child:
            signal.alarm(5)
            time.sleep(4)
            os._exit(0)
        children.append(child)
finally:
    for child in children:
        os.kill(child, signal.SIGKILL)
"""

DAEMON = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
try:
    if not os.fork():
        os.setsid()
        if not os.fork():
            signal.alarm(5)
        time.sleep(4)
        os._exit(0)
except OSError:
    pass
while True:
    pass
"""


def attempt(attack: str) -> str:
    """A program that runs to its end only if the operating system refuses what it tries."""
    return ATTEMPT.format(attack="\n    ".join(attack.strip().splitlines()))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not list(tmp_path.glob("deltafl-*")), "the directory of a program is left"


def test_a_program_passes_that_runs_to_its_end():
    assert passes("")
    assert passes("import math, re, json, random, collections\nassert math.pi > 3")
    assert passes("if __name__ == '__main__': x = 1\nassert x == 1")
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\n"
    assert passes(text + "class A:\n    b: int\nassert A(1) == A(1)")
    assert passes("assert len('\N{SNOWMAN}') == 1")


@pytest.mark.parametrize(
    "program",
    [
        *("assert False", "def f(:", "raise KeyboardInterrupt", "\0", "import numpy", "input()"),
        *("exit(0)", "import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"),
        "def f(n): return f(n + 1)\nf(0)",
        "import ctypes; ctypes.string_at(0)",
    ],
)
def test_a_program_that_breaks_or_leaves_early_does_not_pass(program):
    assert not passes(program)


def test_a_program_may_use_files_of_its_own_directory_and_nothing_else_is_in_it():
    assert passes(
        "import os, tempfile\nassert os.listdir() == []\n"
        "with open('a', 'w') as file: file.write('b')\n"
        "os.rename('a', 'c')\nassert open('c').read() == 'b'\nos.remove('c')\n"
        "with tempfile.NamedTemporaryFile() as file: file.write(b'b')"
    )


HARMLESS_IN_THE_OPEN = {
    "read a file": "open({own!r}).read()",
    "list a folder": "os.listdir({folder!r})",
    "list the home": "os.listdir(os.path.dirname({own!r}))",
    "read the parent's variables": "open(f'/proc/{{os.getppid()}}/environ').read()",
    "read a device": "open('/dev/zero', 'rb').read(1)",
    "write a file": "open({own!r}, 'a').write('x')",
    "cut a file": "os.truncate({own!r}, 0)",
    "cut a file that is read": "os.open(os.__file__, os.O_RDONLY | os.O_TRUNC) if {confined} else 0",
    "make a file": "open({folder!r} + '/new', 'w')",
    "make a folder": "os.mkdir({folder!r} + '/newer')",
    "make a folder here": "os.mkdir('folder')",
    "make a link": "os.symlink({own!r}, 'link')",
    "make another name": "os.link({own!r}, 'name')",
    "make a pipe": "os.mkfifo('fifo')",
    "rename a file": "os.rename({own!r}, {own!r})",
    "change a mode": "os.chmod({own!r}, 0o600)",
    "change a time": "os.utime({own!r})",
    "change an owner": "os.chown({own!r}, os.getuid(), os.getgid())",
    "remove a file": "os.remove({spare!r})",
    "open a socket": "socket.socket()",
    "open a socket of this machine": "socket.socket(socket.AF_UNIX)",
    "connect to this machine": "socket.create_server(('127.0.0.1', 0))",
    "connect two sockets": "socket.socketpair()",
    "signal the parent": "os.kill(os.getppid(), 0)",
    "signal its group": "os.killpg(os.getpgid(os.getppid()), 0)",
    "start a process": "os._exit(0) if os.fork() == 0 else os.wait()",
    "start a thread": "threading.Thread(target=int).start()",
    "run a program": "subprocess.run(['true'])",
    "become a program": "os.execv(sys.executable, [sys.executable, '-c', 'exit(1)'])",
    "lift a limit": "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    "leave its session": "os.setsid()",
    "keep memory without a name": "os.memfd_create('memory')",
}


@pytest.mark.parametrize("name", HARMLESS_IN_THE_OPEN)
def test_the_system_refuses_an_attack_that_works_in_the_open(name, tmp_path):
    """Each attack is one that does no harm, and is shown to work without the confinement."""
    folder = tmp_path / "home"
    folder.mkdir()
    own, spare = folder / "own", folder / "spare"
    own.write_text("secret")
    spare.write_text("")

    def program(confined: bool) -> str:
        places = {"own": str(own), "spare": str(spare), "folder": str(folder)}
        return attempt(HARMLESS_IN_THE_OPEN[name].format(**places, confined=confined))

    assert passes(program(True))
    assert own.read_text() == "secret"
    assert sorted(folder.iterdir()) == [own, spare]
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-I", "-c", program(False)]
    opened = subprocess.run(command, cwd=work, capture_output=True)
    assert opened.returncode == 1, opened


def test_the_home_and_the_folder_of_the_package_are_not_read():
    for place in (Path.home(), Path(sandbox.__file__).parent, "/etc", "/tmp", "/"):
        assert passes(attempt(f"os.listdir({str(place)!r})"))
    assert passes(attempt("open('/etc/passwd')"))


def test_no_variable_of_the_environment_is_seen(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert passes("import os\nassert not {*os.environ} - {'PYTHONHASHSEED', 'LC_CTYPE'}")
    assert passes("import sys\nassert sys.argv[1:] == []")


def test_a_fork_bomb_has_no_child():
    assert passes(attempt(BOMB))


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except OSError: pass\nwhile True: pass",
        "import os, signal, time\n" + DAEMON,
        "while True: print('x' * 10**6)",
        "import time; time.sleep(60)",
        "import signal; signal.alarm(0); signal.pause(); import time; time.sleep(60)",
    ],
)
def test_what_does_not_end_is_ended_and_leaves_nobody(program):
    tag = (1 << 30) + 4096 * os.getpid()
    start = time.monotonic()
    assert not passes(program, Limits(seconds=1, memory=tag))
    assert time.monotonic() - start < 30
    assert not [p for p in Path("/proc").glob("[0-9]*") if str(tag) in command_line(p)]


def command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def test_memory_ends_where_its_limit_is():
    assert passes(attempt("bytearray(100 << 30)"))
    assert passes(attempt("import mmap; mmap.mmap(-1, 100 << 30)"))
    assert passes("bytearray(100 << 20)")
    assert not passes("bytearray(100 << 20)", Limits(memory=100 << 20))


def test_files_end_where_their_limits_are():
    assert passes(attempt("open('huge', 'wb').write(bytes(2 << 20))"))
    assert passes(attempt("open('sparse', 'wb').truncate(1 << 40)"))
    assert passes("open('small', 'wb').write(bytes(1 << 20))")
    many = (
        "import time\nfor i in range(40): open(str(i), 'wb').write(bytes(1 << 20))\ntime.sleep({})"
    )
    assert passes(many.format(0.5), Limits(files=40))
    assert not passes(many.format(0.5), Limits(files=39))


def test_programs_run_in_threads_and_forked_workers_alike():
    programs = ["pass", "assert False"] * 8
    expected = [True, False] * 8
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(passes, programs)] == expected
    if can_fork():
        workers = [worker(program) for program in programs[:4]]
        assert [os.waitpid(child, 0)[1] == 0 for child in workers] == expected[:4]


def worker(program: str) -> int:
    child = fork()
    if not child:
        os._exit(0 if passes(program) else 1)
    return child


def test_hashes_and_so_the_order_of_sets_are_the_same_each_time():
    program = f"assert hash('a') == {hash_of_a()}"
    assert all(passes(program) for _ in range(3))


def hash_of_a() -> str:
    command = [sys.executable, "-S", "-c", "print(hash('a'))"]
    environment = {"PYTHONHASHSEED": "0"}
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    ("where", "value"), [("_filter", lambda machine: b""), ("sys.platform", "darwin")]
)
def test_where_a_program_cannot_be_confined_none_is_run(where, value, tmp_path, monkeypatch):
    monkeypatch.setattr(f"deltafl.tasks.sandbox.{where}", value)
    check_confinement.cache_clear()
    with pytest.raises(DeltaflError, match=r"cannot confine .* none is run: .*Landlock"):
        passes("")
    check_confinement.cache_clear()


def test_programs_are_run_only_where_that_is_allowed():
    with pytest.raises(DeltaflError, match=r'task "mbpp" .* --allow-code-execution \(data\.allow_'):
        check_allowed(False, 'task "mbpp"')
    check_allowed(True, 'task "mbpp"')
