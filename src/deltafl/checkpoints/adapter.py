"""LoRA adapters in peft's files: what they are added to, and which tensors they change by what."""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from deltafl.checkpoints.layout import ADAPTER, Entry, Layout, fingerprint, read_layout, split_ref
from deltafl.errors import DeltaflError, shorten

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."

VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "layer_replication",
    "target_parameters",
    "modules_to_save",
)
"""Keys of CONFIG for more than, or something else than, a product beside each weight."""

INITS = (True, False, "gaussian", "eva", "orthogonal")
"""The values of `init_lora_weights` that leave the base as it is."""

_LORA = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")

_SIDE = re.compile(r"\blora_(embedding_)?([AB]|down|up)\b")


class _Config(BaseModel):
    """CONFIG, with peft's defaults."""

    model_config = ConfigDict(extra="allow")

    peft_type: str
    base_model_name_or_path: str | None = None
    lora_alpha: float = 8
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True

    @property
    def beyond(self) -> list[str]:
        """What makes it something else than plain LoRA."""
        found = [self.peft_type] * (self.peft_type != "LORA")
        found += [key for key in VARIANTS if (self.model_extra or {}).get(key)]
        if self.init_lora_weights not in INITS:
            found.append(f"init_lora_weights {self.init_lora_weights}, which changes the base")
        return found

    def scale(self, module: str, rank: int) -> float:
        """What multiplies the product beside the weight of a module."""
        patterns = self.alpha_pattern.items()
        fits = (alpha for key, alpha in patterns if re.match(rf"(.*\.)?({key})$", module))
        return next(fits, self.lora_alpha) / (rank**0.5 if self.use_rslora else rank)


class Product(NamedTuple):
    """scale * B @ A, by their names in the file, or its transpose; entry: shape of the weight."""

    a: str
    b: str
    scale: float
    transposed: bool
    entry: Entry


@dataclass(frozen=True)
class Adapter:
    """A LoRA: its base, and weight that it changes, by the module's name -> product.

    named: whether the user named the base. fingerprint: of the base, where our own record says it.
    """

    base: str
    named: bool
    fingerprint: str | None
    products: Mapping[str, Product]

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The weights that it changes."""
        return {name: product.entry for name, product in self.products.items()}

    def fits(self, base: Layout) -> bool:
        """Whether this is its base: by fingerprint, of a base that is not here by name."""
        known = {self.fingerprint} - {None}
        if self.named or (not known and Path(self.base).exists()):
            known.add(fingerprint(read_layout(self.base)))
        if known:
            return known == {fingerprint(base)}
        return Path(self.base).name == Path(base.ref.partition("@")[0]).name


def read_adapter(layout: Layout) -> Adapter | None:
    """The adapter in a folder; None for a model.

    Raises:
        DeltaflError: it is more than LoRA, or not what its configuration says.
    """
    base, _ = split_ref(layout.ref)
    if layout.files[0].name != ADAPTER:
        if base:
            raise DeltaflError(f'"{layout.ref}": "{layout.folder}" is a model and no adapter')
        if any(_SIDE.search(name) for name in layout.entries):
            raise DeltaflError(
                f'"{layout.ref}": holds an adapter; give the folder that peft saved, with '
                f"{ADAPTER} and {CONFIG}"
            )
        return None
    file = layout.folder / CONFIG
    try:
        config = _Config.model_validate_json(file.read_bytes())
    except (OSError, ValueError):
        raise DeltaflError(f'"{file}": missing, or not what peft writes; save it again') from None
    sides: dict[str, dict[str, str]] = {}
    beyond, embeddings = config.beyond, set[str]()
    for name in layout.entries:
        if found := _LORA.fullmatch(name):
            sides.setdefault(found[1], {})[found[3]] = name
            embeddings |= {found[1]} if found[2] else set()
        elif not config.beyond:
            beyond.append(name.removeprefix(PREFIX))
    if beyond:
        raise DeltaflError(
            f'"{layout.ref}": is more than plain LoRA ({shorten(beyond)}); merge it into its base '
            "first (peft: merge_and_unload, then save_pretrained)"
        )
    products = dict[str, Product]()
    for module, names in sides.items():
        a, b = (layout.entries.get(names.get(side, "")) for side in "AB")
        if not a or not b or b.shape[1:2] != a.shape[:1] or prod(b.shape[2:]) != 1:
            raise DeltaflError(f'"{layout.ref}": A and B of "{module}" are not of one rank')
        shape, transposed = (b.shape[0], *a.shape[1:]), config.fan_in_fan_out
        if transposed or module in embeddings:
            shape, transposed = shape[::-1], True
        entry, scale = Entry(b.dtype, shape), config.scale(module, a.shape[0])
        products[f"{module}.weight"] = Product(names["A"], names["B"], scale, transposed, entry)
    return Adapter(
        base or config.base_model_name_or_path or "unknown",
        bool(base),
        _recorded(layout.folder),
        products,
    )


def _recorded(folder: Path) -> str | None:
    """The fingerprint of the base in our own record beside an adapter."""
    for name in ("training.json", "deltafl.json"):
        if (folder / name).is_file():
            with contextlib.suppress(ValueError, TypeError, LookupError):
                return json.loads((folder / name).read_text())["base"]["fingerprint"]
    return None
