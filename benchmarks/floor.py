"""The plain I/O floor: read every file given, write a copy of the first. No torch, one thread, one buffer.

python floor.py COPY [--fsync] FILE...
"""

import os
import sys

BUFFER = 1 << 20


def main() -> None:
    sync = "--fsync" in sys.argv
    copy, *files = [a for a in sys.argv[1:] if a != "--fsync"]
    buffer = memoryview(bytearray(BUFFER))
    out = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    for i, file in enumerate(files):
        source, at = os.open(file, os.O_RDONLY), 0
        while count := os.preadv(source, [buffer], at):
            if i == 0:
                os.pwrite(out, buffer[:count], at)
            at += count
        os.close(source)
    if sync:
        os.fsync(out)
    os.close(out)


if __name__ == "__main__":
    main()
