"""Where a checkpoint's tensors lie on disk, read from headers alone and without torch.

Knows a Hugging Face directory (one file, or shards with an index), a single .safetensors file, and finds the file of a
torch state dict; a hub id is downloaded to the hub's cache first.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from deltafl.errors import DeltaflError, shorten

SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
}  # fmt: skip
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
MAX_HEADER = 100_000_000

COMPANIONS = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")
"""Suffixes of what belongs to a model beside its weights: configuration, tokenizer, processor, code."""


@dataclass(frozen=True)
class Entry:
    """One tensor: its dtype in safetensors' spelling, its shape, and its bytes [start, stop) in `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether arithmetic is defined on it; 8-bit floats are quantised and do not count."""
        return self.dtype in FLOATING


@dataclass(frozen=True)
class Layout:
    """A checkpoint on disk: `ref` as the user wrote it, its files, and its entries in the files' order.

    `pickled`: the file is a torch state dict, whose entries only torch can read; `entries` is then empty.
    """

    ref: str
    folder: Path
    files: tuple[Path, ...]
    entries: Mapping[str, Entry]
    pickled: bool = False
    revision: str | None = None

    @property
    def num_bytes(self) -> int:
        """Size of all weight files."""
        return sum(f.stat().st_size for f in self.files)

    @cached_property
    def header_hash(self) -> str:
        """sha256 over name, dtype and shape of every tensor, in the order of names."""
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\n".encode())
        return digest.hexdigest()


def read_layout(ref: str | os.PathLike[str]) -> Layout:
    """The layout of a local path or, if there is none, of a hub id. Raises DeltaflError."""
    path, revision = Path(ref), None
    if not path.exists():
        path, revision = _download(str(ref))
    if path.is_file():
        return _of_files(str(ref), path.parent, (path,), revision)
    for single in (
        "model.safetensors",
        "pytorch_model.bin",
    ):  # in the order in which transformers looks
        if (path / single).is_file():
            return _of_files(str(ref), path, (path / single,), revision)
        index = path / f"{single}.index.json"
        if index.is_file():
            return _of_files(str(ref), path, _indexed(index), revision, index)
    if any((path / f"adapter_model.{suffix}").is_file() for suffix in ("safetensors", "bin")):
        raise DeltaflError(
            f'"{ref}": holds an adapter and not a model; merge it into its base first '
            "(peft: merge_and_unload, then save_pretrained)"
        )
    found = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    if len(found) == 1:
        return _of_files(str(ref), path, tuple(found), revision)
    held = shorten([f.name for f in found]) if found else "no weights"
    raise DeltaflError(
        f'"{ref}": expected model.safetensors, or an index of shards; the folder holds {held}'
    )


def _download(ref: str) -> tuple[Path, str]:
    """Download a hub id's weights, configuration and tokenizer to the hub's cache; (folder, revision)."""
    name, _, revision = ref.partition("@")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise DeltaflError(f'"{ref}": no such file or folder (a hub id has the form owner/name)')
    import huggingface_hub

    wanted = ["*.safetensors", *(f"*{suffix}" for suffix in COMPANIONS)]
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=wanted
            )
        )
        if not list(folder.glob("*.safetensors")):
            wanted = ["*.bin", *wanted]
            folder = Path(
                huggingface_hub.snapshot_download(
                    name, revision=revision or None, allow_patterns=wanted
                )
            )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        why = str(error).strip().splitlines()[0]
        raise DeltaflError(
            f'"{ref}": no such file or folder, and not to be had from the hub ({why})'
        ) from None
    return folder, folder.name


def _indexed(index: Path) -> tuple[Path, ...]:
    """The shards that an index names. Raises DeltaflError for an index that is broken or points outside its folder."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DeltaflError(f'"{index}": not an index of shards; download it again') from None
    for name in names:
        if Path(name).name != name or name in ("..", "."):
            raise DeltaflError(
                f'"{index}": points outside its folder ("{name}"); do not trust this checkpoint'
            )
        if not (index.parent / name).is_file():
            raise DeltaflError(f'"{index}": the shard "{name}" is missing; download it again')
    return tuple(index.parent / name for name in names)


def _of_files(
    ref: str, folder: Path, files: tuple[Path, ...], revision: str | None, index: Path | None = None
) -> Layout:
    if any(f.suffix != ".safetensors" for f in files):
        return Layout(ref, folder, files, {}, pickled=True, revision=revision)
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise DeltaflError(
                    f'"{ref}": tensor "{name}" is in two shards: {entries[name].file.name}, {file.name}'
                )
            entries[name] = entry
    if index is not None:
        named = json.loads(index.read_text())["weight_map"]
        odd = sorted(
            n
            for n in {*named, *entries}
            if n not in entries or named.get(n) != entries[n].file.name
        )
        if odd:
            raise DeltaflError(
                f'"{index}": index and shards disagree about {shorten(odd)}; download it again'
            )
    return Layout(ref, folder, files, entries, revision=revision)


def read_header(file: Path) -> dict[str, Entry]:
    """The entries of one .safetensors file, in the order of their bytes. Raises DeltaflError if it is not whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise DeltaflError(
                f'"{file}": truncated or not a safetensors file ({size} bytes); download it again'
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        offset = 8 + length
        entries = {
            name: Entry(
                info["dtype"],
                tuple(_size(n) for n in info["shape"]),
                file,
                offset + int(info["data_offsets"][0]),
                offset + int(info["data_offsets"][1]),
            )
            for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        }
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
        RecursionError,
    ):
        raise DeltaflError(f'"{file}": its header is corrupt; download it again') from None
    end = offset
    for name, entry in entries.items():
        if not isinstance(entry.dtype, str) or entry.dtype not in SIZES:
            raise DeltaflError(
                f'"{file}": tensor "{name}" has dtype {entry.dtype}, which is not supported'
            )
        if entry.start != end or entry.stop - entry.start != entry.numel * SIZES[entry.dtype]:
            raise DeltaflError(
                f'"{file}": its header is corrupt (the bytes of "{name}"); download it again'
            )
        end = entry.stop
    if end != size:
        raise DeltaflError(
            f'"{file}": {size} bytes, its header says {end}: truncated or corrupt; download it again'
        )
    return entries


def _size(n: object) -> int:
    if not isinstance(n, int) or n < 0:
        raise ValueError
    return n


def fingerprint(layout: Layout, spots: int = 64, length: int = 4096) -> str:
    """sha256 over the header hash and up to `spots` pieces of `length` bytes spread over the tensors.

    Tells two checkpoints of one architecture apart without reading them whole; not a proof that they are equal.
    """
    if layout.pickled:
        return file_hash(layout.files)
    digest = hashlib.sha256(layout.header_hash.encode())
    names = sorted(layout.entries)
    for name in names[:: max(1, len(names) // spots)]:
        entry = layout.entries[name]
        with entry.file.open("rb") as stream:
            stream.seek(entry.start)
            digest.update(stream.read(min(length, entry.stop - entry.start)))
    return digest.hexdigest()


def file_hash(files: Iterable[Path]) -> str:
    """sha256 of the files' bytes, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def identity(layout: Layout, *, full_hash: bool = False) -> dict[str, object]:
    """What the record says of an input."""
    return {
        "ref": layout.ref,
        "revision": layout.revision,
        "files": [f.name for f in layout.files],
        "bytes": layout.num_bytes,
        "header_sha256": None if layout.pickled else layout.header_hash,
        "fingerprint": fingerprint(layout),
        "sha256": {f.name: file_hash([f]) for f in layout.files} if full_hash else None,
    }
