"""Federated averaging by Flower's simulation engine; run with the Python of its own environment. Prints JSON.

FEDERATED_SETTING: a `Setting` as JSON; the number of cores is the argument.
"""

import json
import sys
import time
from itertools import pairwise

from flower_client import SETTING, app
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation
from mlp import Mlp

ENDS: list[float] = []


class Timed(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        if failures:
            raise RuntimeError(f"{len(failures)} clients failed: {failures[0]}")
        aggregated = super().aggregate_fit(server_round, results, failures)
        ENDS.append(time.perf_counter())
        return aggregated


def server_fn(context: Context) -> ServerAppComponents:
    start = ndarrays_to_parameters([t.numpy() for t in Mlp().state_dict().values()])
    strategy = Timed(
        fraction_fit=1.0, fraction_evaluate=0.0, min_fit_clients=SETTING.clients,
        min_available_clients=SETTING.clients, initial_parameters=start,
    )  # fmt: skip
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=SETTING.rounds))


if __name__ == "__main__":
    run_simulation(
        server_app=ServerApp(server_fn=server_fn),
        client_app=app,
        num_supernodes=SETTING.clients,
        backend_config={
            "client_resources": {"num_cpus": 1},
            "init_args": {"num_cpus": int(sys.argv[1])},
        },
    )
    print(json.dumps({"rounds": [b - a for a, b in pairwise(ENDS)]}))
