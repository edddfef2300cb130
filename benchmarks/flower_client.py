"""Flower's clients, in a module of their own: Ray's workers import it."""

import json
import os
from functools import cache

import torch
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context
from mlp import Mlp, Setting, make_data, make_head, shards, shuffled, train_locally

SETTING = Setting(**json.loads(os.environ["FEDERATED_SETTING"]))


@cache
def world() -> tuple:
    """What a worker process makes once: the model, the head and the data."""
    torch.set_num_threads(1)
    return Mlp(), make_head(), *make_data(SETTING.clients * SETTING.examples)


class Client(NumPyClient):
    def __init__(self, number: int) -> None:
        self.number = number

    def fit(self, parameters, config):
        net, head, images, labels = world()
        net.load_state_dict(
            {n: torch.from_numpy(p) for n, p in zip(net.state_dict(), parameters, strict=True)}
        )
        rows = shards(SETTING)[self.number]
        train_locally(net, head, images, labels, shuffled(rows, SETTING), SETTING)
        return [t.numpy() for t in net.state_dict().values()], len(rows), {}


def client_fn(context: Context):
    return Client(int(context.node_config["partition-id"])).to_client()


app = ClientApp(client_fn=client_fn)
