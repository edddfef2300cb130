"""A causal language model on lines of text, through the same code as images."""

from pathlib import Path

import pytest
import torch

from deltafl.models import load_net
from deltafl.training.step import scores
from federated.worlds import RECIPE, federate, language

LINES = RECIPE.replace(
    num_clients=4, sharding="non_iid", nc=1, participation_rate=1.0, lr=0.3, momentum=0.5, grad_clip=1.0,
    head="ridge",
)  # fmt: skip


def test_a_run_gets_better_and_its_best_model_is_tested_and_saved(tmp_path: Path) -> None:
    net, task = language()
    before = net.flat.detach().clone()
    run = federate(net, task, LINES, tmp_path / "run")
    found = [row["val_score"] for row in run.rows]
    assert run.result["metric"] == "log-likelihood"
    assert found[0] < -5
    assert run.result["val_score"] == max(found) > found[0] + 0.5
    assert run.result["best_round"] == found.index(max(found)) > 0
    assert run.rows[1]["bytes_up"] == 4 * 4 * len(net.flat)
    assert (run.rows[0]["setup_bytes_up"], run.rows[0]["setup_bytes_down"]) == (0, 0)
    saved = load_net(tmp_path / "run" / "model")
    for split in ("val", "test"):
        mean = scores(saved, task, split).double().mean().item()
        assert mean == pytest.approx(run.result[f"{split}_score"], rel=1e-6)
    assert torch.equal(net.flat, before)
