"""Federated learning: rounds of local training, each ended by the server step of a merge."""

from deltafl.federated.client import Client, ClientUpdate, LocalTraining
from deltafl.federated.local import Round
from deltafl.federated.recipe import FederatedRecipe
from deltafl.federated.run import federate

__all__ = [
    "Client",
    "ClientUpdate",
    "FederatedRecipe",
    "LocalTraining",
    "Round",
    "federate",
]
