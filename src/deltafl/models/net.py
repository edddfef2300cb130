"""A model as all that trains, merges and judges sees it: one module, and what of it trains."""

import copy
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deltafl.algebra.tensors import Tensors, lazy
from deltafl.checkpoints.layout import fingerprint, read_layout
from deltafl.checkpoints.naming import match
from deltafl.errors import DeltaflError, shorten
from deltafl.models.head import HEAD_FILE, Head, HeadFit, HeadRecipe, save_head
from deltafl.tasks.inputs import ImageInput, TextInput
from deltafl.tasks.task import Task, check_task

WEIGHTS = "model.safetensors"
MODEL_JSON = "deltafl_model.json"


@lru_cache(maxsize=16)
def _matched(files: tuple[str, ...], given: tuple[str, ...]) -> Mapping[str, str]:
    """Name in files -> name given; kept, for a search loads models of the same names by the
    hundred.
    """
    return match(files, given)[0]


def write_module(
    module: nn.Module, folder: Path, about: Mapping[str, object] | None = None
) -> None:
    """Write the module's tensors by its own names, tied ones under each of their names, into the
    existing `folder`.

    about: how code of a user's own builds the model again, for `deltafl_model.json`.
    """
    state = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in module.state_dict().items()
    }
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    if about:
        (folder / MODEL_JSON).write_text(json.dumps(about, indent=2) + "\n")


class Net:
    """A module with its head inside, whose trained parameters are views of one vector.

    What trains is what requires a gradient: freeze or release parameters before the first use of
    `flat`. `inputs`: what the module takes. `origin`: the folder, hub id or `module:attr` that it
    came from, "" for a new one. `store` writes the module into a folder as `load_net` reads it.
    """

    inner = ""
    """Prefix of the module's tensors that the model's files hold, without it in their names."""

    takes_head = False
    head: Head | None = None

    def __init__(
        self,
        module: nn.Module,
        inputs: ImageInput | TextInput,
        origin: str = "",
        store: Callable[[nn.Module, Path], None] = write_module,
    ) -> None:
        self.module, self.inputs, self.origin, self.store = module, inputs, origin, store

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        return self.module(*args, **kwargs)

    @property
    def core(self) -> nn.Module:
        """The part of the module whose tensors the model's files hold."""
        return self.module.get_submodule(self.inner[:-1])

    @property
    def fingerprint(self) -> str | None:
        """Of the files that the model came from; None for a new one and for one's own code."""
        from_code = ":" in self.origin and not Path(self.origin).is_dir()
        return fingerprint(read_layout(self.origin)) if self.origin and not from_code else None

    @property
    def device(self) -> torch.device:
        """Where the module is, and batches must be."""
        return next(self.module.parameters()).device

    @cached_property
    def flat(self) -> nn.Parameter:
        """The trained parameters end to end, (P,), in the order of `module.named_parameters()`,
        tied ones once. They become views of it, and their gradients of its gradient, which always
        exists: one optimiser over `[flat]` and one all-reduce of `flat.grad` serve the whole model.

        Raises:
            DeltaflError: nothing trains, or parameters on several devices or of several dtypes.
        """
        trained = self._training()
        kinds = {(p.device, p.dtype) for p in trained.values()}
        if len(kinds) != 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
            raise DeltaflError(
                f'model "{self.origin}": what trains must be of one dtype on one device, '
                f"not {found or 'nothing'}"
            )
        flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in trained.values()]))
        flat.grad = torch.zeros_like(flat)
        for name, part in self.slices.items():
            p = trained[name]
            p.data, p.grad = flat.data[part].view_as(p), flat.grad[part].view_as(p)
        return flat

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where in `flat` each trained parameter is, by its name in the module."""
        found, start = {}, 0
        for name, parameter in self._training().items():
            found[name] = slice(start, start := start + parameter.numel())
        return found

    def _training(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    @property
    def trained(self) -> dict[str, Tensor]:
        """Name -> trained parameter without its gradient; views, in the order of `flat`."""
        assert self.flat is not None
        return {n: p.data for n, p in self._training().items()}

    def state(self) -> dict[str, Tensor]:
        """All that training changes: trained parameters and float buffers that are saved; views.

        Buffers that are not float (counters of batches) are nobody's training.
        """
        saved = self.module.state_dict().keys()
        buffers = {n: b for n, b in self.module.named_buffers() if n in saved}
        return self.trained | {n: b for n, b in buffers.items() if b.is_floating_point()}

    def names_in(self, tensors: Collection[str]) -> dict[str, str]:
        """Name in the module -> the name of that tensor among those given, which are the module's
        names or those of its files; what is not given is left out.
        """
        state = self.module.state_dict()
        pairs = {n: n for n in state if n in tensors}
        if self._training().keys() <= pairs.keys():
            return pairs
        files = {self.file_name(n): n for n in state if n.startswith(self.inner)}
        return {files[n]: given for n, given in _matched(tuple(files), tuple(tensors)).items()}

    @torch.no_grad()
    def load(self, tensors: Tensors) -> tuple[str, ...]:
        """Copy in values by the module's names or by those of its files; dtypes are converted.

        Every trained tensor must be given; frozen ones and buffers are copied where given. Returns
        the names that this module does not hold (a text tower, a pooler).

        Raises:
            DeltaflError: a trained tensor is absent or has another shape; nothing is changed then.
        """
        state, pairs = self.module.state_dict(), self.names_in(tensors)
        if missing := [n for n in self._training() if n not in pairs]:
            raise DeltaflError(
                f"the model needs {shorten(missing)}, not among the {len(tensors)} tensors given"
            )
        for name, given in pairs.items():
            shape = lazy(tensors).spec(given).shape
            if state[name].shape != shape:
                raise DeltaflError(
                    f'tensor "{given}" is {shape}, the model has {tuple(state[name].shape)}'
                )
        for name, given in pairs.items():
            state[name].copy_(tensors[given])
        used = set(pairs.values())
        return tuple(n for n in tensors if n not in used)

    def empty(self, tensors: Collection[str]) -> None:
        """Free the memory of the tensors of these names (see `names_in`), which keep their shapes:
        for a model that runs with values from elsewhere.
        """
        state = self.module.state_dict(keep_vars=True)
        for name in self.names_in(tensors):
            state[name].data = state[name].new_zeros(()).expand(state[name].shape)

    def file_name(self, name: str) -> str:
        """The name that the model's files have for the module's tensor `name`."""
        return name.removeprefix(self.inner)

    def prepare(self, task: Task, recipe: HeadRecipe, fit: HeadFit | None = None) -> None:
        """Make the model ready for `task`, in place, before the first use of `flat`: a classifier
        gets the head that `recipe` names, and a causal language model needs none.

        Raises:
            DeltaflError: a head of another model or task, one that this model cannot have, or a
                task that does not keep what `Task` promises.
        """
        if recipe != HeadRecipe.of():
            raise DeltaflError(
                f'model "{self.origin}" is no image classifier, and has no such head; leave out '
                f'head "{recipe.head}" and what belongs to it'
            )
        check_task(task, self, self.device)

    def check(self, task: Task) -> None:
        """Raise DeltaflError where the model cannot do `task` as it is: it has no head, or
        another's.
        """
        check_task(task, self, self.device)

    def head_bytes(self, recipe: HeadRecipe, shards: Sequence[Tensor]) -> tuple[int, int]:
        """Bytes that clients with these shards send, all together, for `prepare`; and of what it
        adds.
        """
        return 0, 0

    def snapshot(self) -> dict[str, object]:
        """All values of the module, and what else `restore` needs, as torch.save can hold them;
        views.
        """
        return {"tensors": self.module.state_dict()}

    def restore(self, snapshot: Mapping) -> None:
        """Take over the values of a snapshot of the same model, prepared or not."""
        self.module.load_state_dict(snapshot["tensors"])

    def save(self, folder: Path) -> None:
        """Write the model into the existing `folder`, so that `load_net(folder)` gives it back."""
        self.store(self.core, folder)
        self.save_head(folder)

    def save_head(self, folder: Path) -> None:
        """Write the head, if there is one, into the existing `folder`."""
        if self.head is not None:
            save_head(self.head, folder / HEAD_FILE)

    def sharing(self) -> Self:
        """A net on the same tensors, for another head: what is loaded into one is in both."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return self._of(copy.deepcopy(self.module, {id(tensor): tensor for tensor in tensors}))

    def copy_to(self, device: torch.device | str) -> Self:
        """A copy of the model on `device`."""
        return self._of(copy.deepcopy(self.module).to(device))

    def _of(self, module: nn.Module) -> Self:
        return type(self)(module, self.inputs, self.origin, self.store)
