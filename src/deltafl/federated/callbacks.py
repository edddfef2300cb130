"""What is done after each round: the callbacks of a user's own, and the count of bytes."""

from deltafl.federated.rounds import RoundResult
from deltafl.federated.server import ServerState
from deltafl.federated.setup import Federation, calibration_clients
from deltafl.sparse.eligible import eligible
from deltafl.training.record import Row


class Callback:
    """Something that is done after each round. The row of a round in the record is what callbacks
    leave in it.
    """

    def begin(self, state: ServerState, row: Row) -> None:
        """Before the first round; `row` is that of round 0. A resumed run has begun."""

    def after(self, state: ServerState, result: RoundResult, row: Row) -> None:
        """A round led to `state`; `row` holds what callbacks before this one put into it."""


class Bytes(Callback):
    """Bytes that go over the network, per round and in all, with the mask and as if there were
    none; `done` rounds are over.

    A client gets and sends 4 bytes for each kept coordinate and each value of float buffers;
    scaffold doubles the trained ones. The mask's bits go to a client once. The pre-trained model
    is at the clients already.

    Step 0, in the first row, of all clients together; no round counts it. Up: what fitting the head
    needs (`Net.head_bytes`); of each client of a calibration a float32 Fisher sum for each
    eligible coordinate. Down: a frozen head to every client once, a trained one to the clients of a
    calibration, since rounds count it.
    """

    def __init__(self, federation: Federation, done: int) -> None:
        net, recipe, mask = federation.net, federation.recipe, federation.mask
        trained = net.flat.numel()
        kept = trained if mask is None else sum(int(m.sum()) for m in mask.values())
        extra = sum(t.numel() for t in net.state().values()) - trained
        times = 2 if recipe.local.algorithm.has_control else 1
        up, head = net.head_bytes(recipe.head, federation.shards)
        asked = sum(map(len, calibration_clients(recipe)))
        scored = sum(int(m.sum()) for m in eligible(net).values()) if asked else 0
        down = asked if recipe.head.train_head else recipe.sharding.num_clients
        self._first = {
            "parameters": trained,
            "kept": kept,
            "setup_bytes_up": up + asked * 4 * scored,
            "setup_bytes_down": head * down,
        }
        self._payload, self._dense = (4 * (times * n + extra) for n in (kept, trained))
        self._mask = 0 if mask is None else -(-trained // 8)
        self._seen = {k for n in range(done) for k in recipe.clients_in(n + 1)}

    def begin(self, state: ServerState, row: Row) -> None:
        row |= self._first

    def after(self, state: ServerState, result: RoundResult, row: Row) -> None:
        chosen, before = result.numbers["clients"], len(self._seen)
        self._seen.update(chosen)
        row["bytes_up"] = up = self._payload * len(chosen)
        row["bytes_down"] = up + self._mask * (len(self._seen) - before)
        row["bytes_up_total"] = up * state.round
        row["bytes_down_total"] = up * state.round + self._mask * len(self._seen)
        row["dense_bytes_up_total"] = self._dense * len(chosen) * state.round
