"""Files that are whole or absent, whatever kills the process."""

import contextlib
import os
import secrets
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> Path:
    """Write `data` to `path` so that a reader, or a later run, finds the old file or the new one and never a part.

    The bytes go to a temporary name in the same folder, are synced, and take the final name; the folder is synced
    too, so that the name survives a power cut. Missing parent folders are made. Returns the path.

    Raises:
        OSError: nothing is left behind, and an older file is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return path


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; a file system that cannot sync a folder is left to its own guarantees."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
