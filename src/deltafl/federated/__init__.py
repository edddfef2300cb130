"""Federated learning: rounds of local training, each ended by the same server step that merges checkpoints."""

from deltafl.federated.client import Client, ClientUpdate, LocalTraining, Round
from deltafl.federated.recipe import FederatedRecipe
from deltafl.federated.rounds import RoundResult, run_round
from deltafl.federated.run import FederatedRun, federate
from deltafl.federated.server import ServerState, choose_clients

__all__ = [
    "Client",
    "ClientUpdate",
    "FederatedRecipe",
    "FederatedRun",
    "LocalTraining",
    "Round",
    "RoundResult",
    "ServerState",
    "choose_clients",
    "federate",
    "run_round",
]
