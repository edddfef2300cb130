"""Where a checkpoint's tensors lie on disk, read from headers alone and without torch.

Knows a Hugging Face directory (one file, or shards with an index), a single .safetensors file, and
finds the file of a torch state dict; a hub id is downloaded to the hub's cache first.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from deltafl.errors import DeltaflError, shorten

SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "C64": 8,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of one element of each dtype, in safetensors' spelling."""

FLOATING = frozenset({"F64", "F32", "F16", "BF16"})

COMPANIONS = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")
"""Suffixes of what belongs to a model beside its weights."""

SINGLES = ("model.safetensors", "pytorch_model.bin")
"""Names of weights in one file, in the order in which transformers looks."""


@dataclass(frozen=True)
class Entry:
    """One tensor: its dtype in safetensors' spelling, its shape, where it begins in `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path = Path()
    start: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.numel * SIZES[self.dtype]

    @property
    def floating(self) -> bool:
        """Whether arithmetic is defined on it; 8-bit floats are quantised and do not count."""
        return self.dtype in FLOATING


@dataclass(frozen=True)
class Layout:
    """A checkpoint on disk: `ref` as the user wrote it, its files, and its entries in their order.

    `pickled`: the file is a torch state dict, whose entries only torch can read; `entries` is
    empty.
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
        for name, entry in sorted(self.entries.items(), key=lambda item: item[0]):
            digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\n".encode())
        return digest.hexdigest()


def read_layout(ref: str | os.PathLike[str]) -> Layout:
    """The layout of a local path or, if there is none, of a hub id. Raises DeltaflError."""
    path, revision = Path(ref), None
    if not path.exists():
        path, revision = _download(str(ref))
    folder = path.parent if path.is_file() else path
    files, index = _weight_files(str(ref), path)
    if any(f.suffix != ".safetensors" for f in files):
        return Layout(str(ref), folder, files, {}, pickled=True, revision=revision)
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                both = f"{entries[name].file.name}, {file.name}"
                raise DeltaflError(f'"{ref}": tensor "{name}" is in two shards: {both}')
            entries[name] = entry
    there = {name: entry.file.name for name, entry in entries.items()}
    if index is not None and (odd := sorted({n for n, _ in there.items() ^ index.items()})):
        raise DeltaflError(
            f'"{ref}": index and shards disagree about {shorten(odd)}; download it again'
        )
    return Layout(str(ref), folder, files, entries, revision=revision)


def _weight_files(ref: str, path: Path) -> tuple[tuple[Path, ...], Mapping[str, str] | None]:
    """The files with the weights, and of shards their index: tensor -> name of its file."""
    if path.is_file():
        return (path,), None
    for single in SINGLES:
        if (path / single).is_file():
            return (path / single,), None
        if (path / f"{single}.index.json").is_file():
            index = _read_index(path / f"{single}.index.json")
            return tuple(path / name for name in sorted(set(index.values()))), index
    if any((path / f"adapter_model.{suffix}").is_file() for suffix in ("safetensors", "bin")):
        raise DeltaflError(
            f'"{ref}": holds an adapter and not a model; merge it into its base first '
            "(peft: merge_and_unload, then save_pretrained)"
        )
    found = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    if len(found) == 1:
        return (found[0],), None
    names = shorten([f.name for f in found]) if found else "no weights"
    raise DeltaflError(
        f'"{ref}": expected model.safetensors, or an index of shards; the folder holds {names}'
    )


def _download(ref: str) -> tuple[Path, str]:
    """Download what belongs to a hub id to its cache; (folder, revision)."""
    name, _, revision = ref.partition("@")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise DeltaflError(f'"{ref}": no such file or folder (a hub id has the form owner/name)')
    import huggingface_hub  # heavy, and for hub ids only

    wanted = ["*.safetensors", *(f"*{suffix}" for suffix in COMPANIONS)]
    try:
        for patterns in (wanted, ["*.bin", *wanted]):
            folder = Path(
                huggingface_hub.snapshot_download(
                    name, revision=revision or None, allow_patterns=patterns
                )
            )
            if list(folder.glob("*.safetensors")):
                break
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        why = str(error).strip().splitlines()[0]
        raise DeltaflError(
            f'"{ref}": no such file or folder, and not to be had from the hub ({why})'
        ) from None
    return folder, folder.name


def _read_index(file: Path) -> dict[str, str]:
    """Tensor -> shard. Raises DeltaflError for an index that is broken or leaves its folder."""
    try:
        index = json.loads(file.read_text())["weight_map"]
        names = set(index.values())
        if not all(isinstance(name, str) for name in names):
            raise TypeError
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DeltaflError(f'"{file}": not an index of shards; download it again') from None
    for name in sorted(names):
        if Path(name).name != name or name in ("..", "."):
            raise DeltaflError(
                f'"{file}": points outside its folder ("{name}"); do not trust this checkpoint'
            )
        if not (file.parent / name).is_file():
            raise DeltaflError(f'"{file}": the shard "{name}" is missing; download it again')
    return index


def read_header(file: Path) -> dict[str, Entry]:
    """The entries of one .safetensors file, in the order of their bytes.

    Raises:
        DeltaflError: the file is not whole, or holds what we cannot read.
    """
    try:
        with safe_open(
            file, "np"
        ) as opened:  # checks that the tensors' bytes are those of the file
            parts = {name: opened.get_slice(name) for name in opened.offset_keys()}
            kinds = {n: (p.get_dtype(), tuple(p.get_shape())) for n, p in parts.items()}
    except SafetensorError as error:
        raise DeltaflError(
            f'"{file}": truncated, corrupt or not a safetensors file ({error}); download it again'
        ) from None
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    entries = {}
    for name, (dtype, shape) in kinds.items():
        if dtype not in SIZES:
            raise DeltaflError(
                f'"{file}": tensor "{name}" has dtype {dtype}, which is not supported'
            )
        entries[name] = Entry(dtype, shape, file, start)
        start += entries[name].num_bytes
    return entries


def fingerprint(layout: Layout, spots: int = 64, length: int = 4096) -> str:
    """sha256 over the header hash and `spots` pieces of `length` bytes spread over the tensors.

    Tells two checkpoints of one architecture apart without reading them whole; not a proof that
    they are equal.
    """
    if layout.pickled:
        return file_hash(layout.files)
    digest = hashlib.sha256(layout.header_hash.encode())
    names = sorted(layout.entries)
    for name in names[:: max(1, len(names) // spots)]:
        entry = layout.entries[name]
        with entry.file.open("rb") as stream:
            stream.seek(entry.start)
            digest.update(stream.read(min(length, entry.num_bytes)))
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
