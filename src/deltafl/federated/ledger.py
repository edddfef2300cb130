"""What a run costs: bytes over the network, memory, time."""

from typing import Any

import torch

from deltafl.federated.client import moving
from deltafl.federated.recipe import FederatedRecipe
from deltafl.federated.rounds import RoundResult
from deltafl.federated.server import choose_clients
from deltafl.federated.setup import Setting, calibration_clients
from deltafl.models.flat import FlatModel
from deltafl.models.heads import LinearHead
from deltafl.sparse.eligible import eligible
from deltafl.sparse.masks import Mask
from deltafl.sparse.packed import index_of


class Ledger:
    """Bytes that go over the network, per round and in all, with the mask and as if there were none.

    A client gets and sends 4 bytes for each kept coordinate and each float buffer and head value; scaffold doubles
    the trained ones. The mask's bits go to a client once. The pre-trained model is at the clients already; what
    step 0 sends is `setup_bytes`.
    """

    def __init__(
        self, recipe: FederatedRecipe, model: FlatModel, head: LinearHead, mask: Mask | None
    ) -> None:
        self._recipe = recipe
        self._seen: set[int] = set()
        self._done = 0
        self._up = self._down = self._dense = 0
        self.parameters = model.flat.numel()
        self.kept = self.parameters if mask is None else index_of(mask, model.slices).count
        extra = sum(t.numel() for n, t in moving(model, head).items() if n not in model.slices)
        trained = sum(p.numel() for p in head.parameters())
        double = recipe.local_algorithm == "scaffold"
        self._payload = 4 * (self.kept + extra + double * (self.kept + trained))
        self._dense_payload = 4 * (self.parameters + extra + double * (self.parameters + trained))
        self._mask_bytes = 0 if mask is None else -(-self.parameters // 8)

    def _count(self, number: int) -> tuple[int, int]:
        """Bytes up and down of round `number`; rounds are counted in order."""
        chosen = choose_clients(self._recipe, number)
        fresh = [k for k in chosen if k not in self._seen]
        self._seen.update(fresh)
        up = self._payload * len(chosen)
        down = up + self._mask_bytes * len(fresh)
        self._done, self._up, self._down = number, self._up + up, self._down + down
        self._dense += self._dense_payload * len(chosen)
        return up, down

    def row(self, number: int, result: RoundResult, accuracy: float | None) -> dict[str, Any]:
        """The row of a round."""
        while self._done < number - 1:  # rounds before a resume
            self._count(self._done + 1)
        up, down = self._count(number)
        return {
            "event": "round",
            "round": number,
            "val_score": accuracy,
            "loss": result.loss,
            "clients": list(result.clients),
            "failed": list(result.failed),
            "num_steps": result.num_steps,
            "bytes_up": up,
            "bytes_down": down,
            "bytes_up_total": self._up,
            "bytes_down_total": self._down,
            "dense_bytes_up_total": self._dense,
            "client_seconds": result.client_seconds,
            "server_seconds": result.server_seconds,
            "peak_memory_bytes": peak_memory() + result.worker_bytes,
        }


def setup_bytes(setting: Setting) -> dict[str, int]:
    """Bytes of step 0, `setup_bytes_up` and `setup_bytes_down`, of all clients together; no round counts them.

    Up: for a ridge head every client's A and b, ((D+1)^2 + (D+1) C) float64 for D features and C classes; for a probe
    D float32 and an int64 label of every example; of each client of a calibration a float32 Fisher sum for each
    eligible coordinate. Down: a frozen head to every client once, a trained one to the clients of a calibration, since
    rounds count it; with `attenuate` the mask so far, a bit for each coordinate, to those of all calibration rounds
    but the first.
    """
    recipe, model, head = setting.recipe, setting.model, setting.head
    features, classes = model.encoder.feature_dim, len(head.class_names)
    up = 0
    if recipe.head == "ridge":
        up += recipe.num_clients * 8 * ((features + 1) ** 2 + (features + 1) * classes)
    elif recipe.head == "probe":
        up += sum(len(rows) for rows in setting.shards) * (4 * features + 8)
    groups = calibration_clients(recipe)
    asked = sum(len(group) for group in groups)
    if asked:
        up += asked * 4 * eligible(model).total
    down = 4 * classes * (features + 1) * (asked if recipe.train_head else recipe.num_clients)
    if recipe.attenuate is not None:
        down += sum(len(group) for group in groups[1:]) * -(-model.flat.numel() // 8)
    return {"setup_bytes_up": up, "setup_bytes_down": down}


def peak_memory() -> int:
    """The most memory that this process has held, in bytes; on a GPU the most of the GPU's."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
