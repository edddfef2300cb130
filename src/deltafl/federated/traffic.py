"""Bytes that go over the network."""

from collections.abc import Sequence

from deltafl.federated.setup import Federation, calibration_clients
from deltafl.sparse.eligible import eligible
from deltafl.training.record import Row


class Traffic:
    """Bytes of each round and in all, with the mask and as if there were none; `done` rounds are
    over.

    A client gets and sends 4 bytes for each kept coordinate and each value of float buffers;
    scaffold doubles the trained ones. The mask's bits go to a client once. The pre-trained model
    is at the clients already.

    first: of step 0, of all clients together; no round counts it. Up: what fitting the head needs
    (`Net.head_bytes`); of each client of a calibration a float32 Fisher sum for each eligible
    coordinate. Down: a frozen head to every client once, a trained one to the clients of a
    calibration, since rounds count it.
    """

    def __init__(self, federation: Federation, done: int) -> None:
        net, recipe, kept = federation.net, federation.recipe, federation.kept
        trained = net.flat.numel()
        extra = sum(t.numel() for t in net.state().values()) - trained
        times = 1 + recipe.local.algorithm.has_control
        up, head = net.head_bytes(recipe.head, federation.shards)
        asked = sum(map(len, calibration_clients(recipe)))
        scored = sum(int(m.sum()) for m in eligible(net).values())
        self.first: Row = {
            "parameters": trained,
            "kept": kept,
            "setup_bytes_up": up + asked * 4 * scored,
            "setup_bytes_down": head
            * (asked if recipe.head.train_head else recipe.sharding.num_clients),
        }
        self._payload, self._dense = (4 * (times * n + extra) for n in (kept, trained))
        self._mask = 0 if federation.mask is None else -(-trained // 8)
        self._seen = {k for n in range(done) for k in recipe.clients_in(n + 1)}

    def after(self, number: int, clients: Sequence[int]) -> Row:
        """Of a round in which these clients took part."""
        before, up = len(self._seen), self._payload * len(clients)
        self._seen.update(clients)
        return {
            "bytes_up": up,
            "bytes_down": up + self._mask * (len(self._seen) - before),
            "bytes_up_total": up * number,
            "bytes_down_total": up * number + self._mask * len(self._seen),
            "dense_bytes_up_total": self._dense * len(clients) * number,
        }
