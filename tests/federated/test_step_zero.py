"""Step 0: shards, heads from the clients' sums, and masks that clients calibrate."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_files import fails
from deltafl.federated import FederatedRecipe
from deltafl.federated import setup as step_zero
from deltafl.federated.setup import calibration_clients, make_shards, prepare
from deltafl.sparse.fisher import FisherScorer
from deltafl.sparse.masks import load_mask, model_hash, save_mask
from federated.worlds import RECIPE, assert_same, begin, federate, halves, plain

SHARDINGS: list[dict[str, Any]] = [
    {"sharding": "non_iid", "nc": 1},
    {"sharding": "non_iid", "nc": 2},
    {"sharding": "dirichlet", "alpha": 0.1},
    {"sharding": "iid", "num_clients": 1, "participation_rate": 1.0},
]


@pytest.mark.parametrize("changes", [{}, {"few_shot": 2}])
def test_a_ridge_head_from_the_clients_is_the_same_however_they_share_the_data(changes: dict):
    heads = []
    for sharding in ({"sharding": "iid"}, *SHARDINGS):
        recipe, net = RECIPE.replace(head="ridge", **changes, **sharding), plain()
        shards = make_shards(halves(), recipe)
        assert len(shards) == recipe.sharding.num_clients
        prepare(net, halves(), recipe, shards)
        heads.append(net.head)
        assert not any(p.requires_grad for p in heads[-1].parameters())
    for head in heads[1:]:
        torch.testing.assert_close(head.weight, heads[0].weight, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(head.bias, heads[0].bias, rtol=1e-6, atol=1e-7)


CALIBRATED = RECIPE.replace(
    num_clients=8, participation_rate=0.25, sparsity_ratio=0.5, calibration_rounds=4, calibration_examples=4
)  # fmt: skip


def asked(
    recipe: FederatedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[tuple[int, ...], int]]:
    """(rows, first draw of the labels' generator) of every Fisher sum that a client is asked for."""
    found: list[tuple[tuple[int, ...], int]] = []

    class Recorded(FisherScorer):
        def __call__(self, ids, generator):
            state = generator.get_state()
            found.append((tuple(ids.tolist()), int(torch.randint(2**40, (), generator=generator))))
            generator.set_state(state)
            return super().__call__(ids, generator)

    monkeypatch.setattr(step_zero, "FisherScorer", Recorded)
    begin(tmp_path, recipe)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("kind", ["average", "progressive"])
def test_calibration_asks_fresh_clients_for_fresh_examples(kind: str, tmp_path, monkeypatch):
    recipe = CALIBRATED.replace(calibration=kind)
    groups = calibration_clients(recipe)
    assert [len(g) for g in groups] == [2] * 4
    assert sorted(k for g in groups for k in g) == list(range(8)), "no client is asked twice"
    assert groups != [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups != calibration_clients(recipe.replace(seed=9))
    found = asked(recipe, tmp_path, monkeypatch)
    shards = make_shards(halves(), recipe)
    for (rows, _), k in zip(found, [k for g in groups for k in g], strict=True):
        assert len(rows) == 4
        assert set(rows) <= set(shards[k].tolist())
        assert rows != tuple(shards[k][:4].tolist())
    assert len({rows for rows, _ in found}) == len({draw for _, draw in found}) == 8
    assert asked(recipe, tmp_path, monkeypatch) == found


def test_fisher_sums_are_added_over_examples_and_not_averaged_over_clients(tmp_path: Path) -> None:
    """With the data's labels and all examples of all clients, the mask is that of the whole data at once."""
    recipe = RECIPE.replace(
        participation_rate=1.0, sparsity_ratio=0.6, fisher_labels="empirical", calibration_examples=10**6,
        sharding="dirichlet", alpha=0.3,
    )  # fmt: skip
    many = begin(tmp_path, recipe).federation.mask
    one = begin(tmp_path, recipe.replace(num_clients=1, sharding="iid", alpha=None)).federation.mask
    assert_same(many, one)
    kept, all_of_them = (sum(int(f(m)) for m in many.values()) for f in (torch.sum, torch.numel))
    assert kept == round(0.4 * all_of_them)


def test_a_mask_from_a_file_is_used_and_one_of_another_model_refused(tmp_path: Path) -> None:
    net = plain()
    mask = {n: torch.zeros_like(t, dtype=torch.bool) for n, t in net.trained.items()}
    mask["encoder.last.weight"][:, 3] = True
    save_mask(mask, tmp_path / "mask", model_hash(net), {})
    recipe = RECIPE.replace(mask_file=str(tmp_path / "mask"))
    assert_same(begin(tmp_path, recipe).federation.mask, mask)
    run = federate(plain(), halves(), recipe, tmp_path / "run")
    assert run.rows[0]["kept"] == 5
    meta = load_mask(tmp_path / "run" / "mask.safetensors", None)[1]
    assert meta == {"strategy": None, "file": str(tmp_path / "mask")}
    other = plain()
    with torch.no_grad():
        other.module.encoder.last.bias[0] += 1
    fails("was made for another model, or other weights of it", begin, tmp_path, recipe, other)


def test_shards_are_a_function_of_the_seed_and_the_sharding_alone() -> None:
    unlike = RECIPE.replace(lr=1.0, participation_rate=1.0, aggregator="median", head="ridge")
    first, same, other = (
        make_shards(halves(), recipe) for recipe in (RECIPE, unlike, RECIPE.replace(seed=8))
    )
    assert all(map(torch.equal, first, same))
    assert not all(map(torch.equal, first, other))
    assert torch.equal(torch.cat(first).sort().values, torch.arange(50))
