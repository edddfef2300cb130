"""Run a command or functions in turns and measure them; control the page cache."""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

INTERVAL = 0.1


@dataclass(frozen=True)
class Sample:
    """One run: seconds, and bytes of anonymous memory (sampled, of all child processes together)."""

    wall: float
    cpu: float
    anonymous: int
    output: str


def run(command: Sequence[str]) -> Sample:
    """Run to the end. Raises RuntimeError with the end of what it printed if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak, done = [0], threading.Event()
    sampler = threading.Thread(target=_sample, args=(process.pid, peak, done))
    sampler.start()
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    done.set()
    sampler.join()
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command)}\nfailed with {process.returncode}:\n{output[-3000:]}"
        )
    return Sample(wall, usage.ru_utime + usage.ru_stime, peak[0], output)


def _sample(pid: int, peak: list[int], done: threading.Event) -> None:
    while not done.wait(INTERVAL):
        peak[0] = max(peak[0], _anonymous(pid))


def _anonymous(pid: int) -> int:
    """Pss_Anon of a process and its descendants, in bytes; 0 for what has ended meanwhile.

    A page that forked processes share counts once for all of them, as it takes memory once.
    """
    try:
        status = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = next(
        (
            int(line.split()[1]) * 1024
            for line in status.splitlines()
            if line.startswith("Pss_Anon")
        ),
        0,
    )
    return own + sum(_anonymous(int(child)) for child in children)


def make_warm(files: Sequence[Path]) -> None:
    """Read the files into the page cache."""
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 22):
                pass


def make_cold(files: Sequence[Path]) -> None:
    """Drop the files from the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def machine() -> str:
    """Cores, processor, memory and kernel; no host name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        "unknown processor",
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return f"{os.cpu_count()} cores of {model}, {memory:.0f} GB of memory, Linux {os.uname().release.split('-')[0]}"


def in_turns(
    contenders: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of every contender in every turn; each turn starts with another; two turns beforehand do not count."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - started)
    return {name: own[2:] for name, own in times.items()}


def ratios(times: Mapping[str, Sequence[float]], over: str, under: str) -> list[float]:
    """over / under in each turn."""
    return [a / b for a, b in zip(times[over], times[under], strict=True)]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median and, in brackets, the range."""
    low, middle, high = (f"{x:.{digits}f}" for x in (min(values), median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"
