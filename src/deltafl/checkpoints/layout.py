"""Where a checkpoint's tensors lie on disk, read from headers alone and without torch.

Knows a Hugging Face directory (one file, or shards with an index), a single .safetensors file, and
finds the file of a torch state dict; a hub id is downloaded to the hub's cache first.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel
from safetensors import SafetensorError, safe_open

from deltafl.errors import DeltaflError, shorten

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Dtype in safetensors' spelling -> in torch's."""

CODES = {name: code for code, name in DTYPES.items()}

SIZES = {code: int((re.findall(r"\d+", code) or [8])[0]) // 8 for code in DTYPES}
"""Bytes of one element."""

FLOATING = frozenset({"F64", "F32", "F16", "BF16"})

COMPANIONS = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")
"""Suffixes of what belongs to a model beside its weights."""

SINGLES = ("model.safetensors", "pytorch_model.bin")
"""Names of weights in one file, in the order in which transformers looks."""

ADAPTER = "adapter_model.safetensors"
"""Name of peft's weights, which are a model's only together with a base's."""


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
    empty. `ranges`: of the layers that a stack takes from its parts.
    """

    ref: str
    folder: Path
    files: tuple[Path, ...]
    entries: Mapping[str, Entry]
    pickled: bool = False
    revision: str | None = None
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of all weight files."""
        return sum(f.stat().st_size for f in self.files)

    @property
    def passed_over(self) -> list[str]:
        """Other weights in the folder, perhaps left over, that are not those of the same model."""
        others = (f"{SINGLES[0]}.index.json", ADAPTER) if self.files[0].name == SINGLES[0] else ()
        return [name for name in others if (self.folder / name).is_file()]

    @cached_property
    def header_hash(self) -> str:
        """sha256 over name, dtype and shape of every tensor, in the order of names."""
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\n".encode())
        return digest.hexdigest()


def split_ref(ref: str) -> tuple[str, str]:
    """Base and adapter of `BASE+ADAPTER`; of anything else "", and the reference as it is."""
    base, _, adapter = ref.rpartition("+")
    return ("", ref) if Path(ref).exists() else (base, adapter)


def lasting_ref(ref: str) -> str:
    """A path that holds in any working directory, or a hub id."""
    return str(Path(ref).absolute()) if Path(ref).exists() else ref


def read_layout(ref: str | os.PathLike[str]) -> Layout:
    """The layout of a local path or, if there is none, of a hub id; of `BASE+ADAPTER` that of the
    adapter. Raises DeltaflError.
    """
    _, own = split_ref(str(ref))
    path, revision = Path(own), None
    if not path.exists():
        path, revision = _download(own)
    folder = path.parent if path.is_file() else path
    files, index = _weight_files(str(ref), path)
    if any(f.suffix != ".safetensors" for f in files):
        return Layout(str(ref), folder, files, {}, pickled=True, revision=revision)
    headers = {file.name: read_header(file) for file in files}
    entries = {name: entry for header in headers.values() for name, entry in header.items()}
    places = {(name, file) for file, header in headers.items() for name in header}
    if index is not None and (odd := sorted({name for name, _ in places ^ index.items()})):
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
    if (path / ADAPTER).is_file():
        return (path / ADAPTER,), None
    if (path / "adapter_model.bin").is_file():
        raise DeltaflError(f'"{ref}": holds a pickled adapter; save it as {ADAPTER} with peft')
    found = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    if len(found) == 1:
        return (found[0],), None
    names = shorten([f.name for f in found]) + "; name one" if found else "no weights"
    if (path / "snapshots").is_dir():
        names = "the hub's cache of a model; give its id, or a folder in snapshots/"
    raise DeltaflError(
        f'"{ref}": expected model.safetensors, or an index of shards; the folder holds {names}'
    )


def _download(ref: str) -> tuple[Path, str]:
    """Download what belongs to a hub id to its cache; (folder, revision)."""
    name, _, revision = ref.partition("@")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise DeltaflError(f'"{ref}": no such file or folder (a hub id has the form owner/name)')
    import huggingface_hub  # heavy, and for hub ids only

    wanted = ["*.safetensors", "README.md", *(f"*{suffix}" for suffix in COMPANIONS)]
    try:
        for patterns in (wanted, ["*.bin", *wanted]):
            found = huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=patterns
            )
            if any(Path(found).glob("*.safetensors")):
                break
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        why = str(error).strip().splitlines()[0]
        raise DeltaflError(
            f'"{ref}": no such file or folder, and not to be had from the hub ({why})'
        ) from None
    return Path(found), Path(found).name


class _Index(BaseModel):
    weight_map: dict[str, str]


def _read_index(file: Path) -> dict[str, str]:
    """Tensor -> shard. Raises DeltaflError for an index that is broken or leaves its folder."""
    try:
        index = _Index.model_validate_json(file.read_bytes()).weight_map
    except ValueError:
        raise DeltaflError(f'"{file}": not an index of shards; download it again') from None
    for name in sorted(set(index.values())):
        if Path(name).name != name or not (file.parent / name).is_file():
            raise DeltaflError(
                f'"{file}": the shard "{name}" is not in its folder; download it again'
            )
    return index


def read_header(file: Path) -> dict[str, Entry]:
    """The entries of one .safetensors file, in the order of their bytes.

    Raises:
        DeltaflError: the file is not whole, or holds what we cannot read.
    """
    entries = {}
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    try:
        with safe_open(file, "np") as opened:  # checks that the tensors fill the file
            for name in opened.offset_keys():
                part = opened.get_slice(name)
                entry = Entry(part.get_dtype(), tuple(part.get_shape()), file, start)
                if entry.dtype not in SIZES:
                    raise DeltaflError(
                        f'"{file}": tensor "{name}" has dtype {entry.dtype}, which is not supported'
                    )
                entries[name] = entry
                start += entry.num_bytes
    except SafetensorError as error:
        raise DeltaflError(
            f'"{file}": truncated, corrupt or not a safetensors file ({error}); download it again'
        ) from None
    return entries


def fingerprint(layout: Layout) -> str:
    """sha256 over the header hash and 64 pieces of 4 KiB spread over the tensors.

    Tells two checkpoints of one architecture apart without reading them whole; not a proof that
    they are equal.
    """
    if layout.pickled:
        return file_hash(layout.files)
    digest = hashlib.sha256(layout.header_hash.encode())
    names = sorted(layout.entries)
    for name in names[:: max(1, len(names) // 64)]:
        entry = layout.entries[name]
        with entry.file.open("rb") as stream:
            stream.seek(entry.start)
            digest.update(stream.read(min(4096, entry.num_bytes)))
    return digest.hexdigest()


def file_hash(files: Iterable[Path]) -> str:
    """sha256 of the files' bytes, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
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
