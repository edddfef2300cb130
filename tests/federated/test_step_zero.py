"""Step 0: shards, heads from the clients' sums, and masks that clients calibrate."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deltafl.errors import DeltaflError
from deltafl.federated import FederatedRecipe, federate, run_round
from deltafl.federated import setup as step_zero
from deltafl.federated.setup import calibration_clients, make_head, make_shards
from deltafl.models.flat import FlatModel
from deltafl.models.heads import few_per_class, random_head, save_head
from deltafl.models.probe import probe_head
from deltafl.models.ridge import RidgeStatistics, ridge_head, solve
from deltafl.seeding import keyed_generator
from deltafl.sparse.masks import MASK_STRATEGIES, load_mask, mask_meta, model_hash, save_mask
from deltafl.training.legacy import extract_features, predict_correct
from federated.worlds import RECIPE, assert_same, begin, plain
from tiny_models import NAMES, tiny_task

SHARDINGS = [
    {"sharding": "iid"},
    {"sharding": "non_iid", "nc": 1},
    {"sharding": "non_iid", "nc": 2},
    {"sharding": "dirichlet", "alpha": 0.1},
    {"sharding": "iid", "num_clients": 1, "participation_rate": 1.0},
]


@pytest.mark.parametrize("changes", SHARDINGS, ids=str)
def test_a_ridge_head_from_the_clients_is_that_of_the_union(
    changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, task = replace(RECIPE, head="ridge", **changes), tiny_task()
    model = FlatModel(plain())
    totals: list[RidgeStatistics] = []

    def recorded(total: RidgeStatistics, *rest):
        totals.append(total)
        return ridge_head(total, *rest)

    monkeypatch.setattr(step_zero, "ridge_head", recorded)
    shards = make_shards(task, recipe)
    assert len(shards) == recipe.num_clients
    head = make_head(model, task, shards, recipe)
    phi = extract_features(model, task.train).double()
    union = RidgeStatistics.of(phi, task.train.labels, 3)
    torch.testing.assert_close(totals[0].A, union.A, rtol=1e-12, atol=0)
    torch.testing.assert_close(totals[0].b, union.b, rtol=1e-12, atol=0)

    found = solve(
        totals[0], 0.1, NAMES
    )  # against the normal equations in numpy, with centred features
    x, y = phi.numpy() - phi.mean(0).numpy(), np.eye(3)[task.train.labels.numpy()]
    alpha = 0.1 * np.trace(x.T @ x) / x.shape[1]
    wanted = np.linalg.solve(x.T @ x + alpha * np.eye(x.shape[1]), x.T @ (y - y.mean(0)))
    np.testing.assert_allclose(found.weight.numpy(), wanted.T, rtol=1e-5, atol=1e-6)

    whole = ridge_head(union, extract_features(model, task.val), task.val.labels, NAMES)
    torch.testing.assert_close(head.weight, whole.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(head.bias, whole.bias, rtol=1e-6, atol=1e-7)
    assert not head.parameters()


def test_a_few_shot_head_knows_a_few_of_each_class_wherever_they_are() -> None:
    recipe, task, model = replace(RECIPE, head="ridge", few_shot=2), tiny_task(), FlatModel(plain())
    head = make_head(model, task, make_shards(task, recipe), recipe)
    rows = few_per_class(task.train.labels, 2, keyed_generator(recipe.seed, "few-shot"))
    assert len(rows) == 6
    phi, val = extract_features(model, task.train), extract_features(model, task.val)
    wanted = ridge_head(
        RidgeStatistics.of(phi[rows], task.train.labels[rows], 3), val, task.val.labels, NAMES
    )
    torch.testing.assert_close(head.weight, wanted.weight, rtol=1e-5, atol=1e-6)
    full = make_head(model, task, make_shards(task, recipe), replace(recipe, few_shot=None))
    assert not torch.allclose(full.weight, head.weight)


@pytest.mark.parametrize("classes", [3, 2])
def test_a_probe_predicts_as_scikit_learn_does(classes: int) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    task, model = tiny_task(train=90, val=60), FlatModel(plain())
    phi, val = extract_features(model, task.train), extract_features(model, task.val)
    rows, few = task.train.labels < classes, task.val.labels < classes
    labels, val_labels = task.train.labels[rows], task.val.labels[few]
    head = probe_head(phi[rows], labels, val[few], val_labels, NAMES)
    scaler = StandardScaler().fit(phi[rows].double().numpy())
    fitted = [
        LogisticRegression(C=c, max_iter=500).fit(
            scaler.transform(phi[rows].double().numpy()), labels.numpy()
        )
        for c in (0.01, 0.1, 1.0, 10.0)
    ]
    guesses = [f.predict(scaler.transform(val[few].double().numpy())) for f in fitted]
    scores = [float((g == val_labels.numpy()).mean()) for g in guesses]
    mine = head(val[few]).argmax(1).numpy()
    assert (mine == val_labels.numpy()).mean() == pytest.approx(max(scores), abs=1 / len(mine))
    assert (mine == guesses[int(np.argmax(scores))]).mean() > 0.95
    assert max(scores) > 1.2 / classes


def test_heads_by_name_from_a_file_and_trained(tmp_path: Path) -> None:
    task, model = tiny_task(), FlatModel(plain())
    shards = make_shards(task, RECIPE)
    linear = make_head(model, task, shards, RECIPE)
    assert torch.equal(
        linear.weight, random_head(5, NAMES, keyed_generator(RECIPE.seed, "head")).weight
    )
    save_head(linear, tmp_path / "head.safetensors")
    read = make_head(
        model,
        task,
        shards,
        replace(RECIPE, head=str(tmp_path / "head.safetensors"), train_head=True),
    )
    assert torch.equal(read.weight, linear.weight)
    assert len(read.parameters()) == 2
    save_head(random_head(9, NAMES, torch.Generator()), tmp_path / "other.safetensors")
    with pytest.raises(DeltaflError, match="takes 9 features, the model gives 5"):
        make_head(model, task, shards, replace(RECIPE, head=str(tmp_path / "other.safetensors")))
    probe = make_head(model, task, shards, replace(RECIPE, head="probe"))
    ridge = make_head(model, task, shards, replace(RECIPE, head="ridge"))
    for better in (probe, ridge):
        assert (
            predict_correct(model, better, task.val).sum()
            > predict_correct(model, linear, task.val).sum()
        )


def test_a_frozen_head_does_not_move_and_a_trained_one_does(tmp_path: Path) -> None:
    for train_head in (False, True):
        begun = begin(tmp_path, replace(RECIPE, train_head=train_head))
        before = begun.setting.head.weight.detach().clone()
        assert any("head" in n for n in begun.state.params) == train_head
        state, _ = run_round(begun.state, begun.world)
        if train_head:
            assert not torch.equal(state.params["deltafl_head.weight"], before)
        else:
            assert torch.equal(begun.setting.head.weight, before)


CALIBRATED = replace(
    RECIPE,
    num_clients=8,
    participation_rate=0.25,
    sparsity_ratio=0.5,
    calibration_rounds=4,
    calibration_examples=4,
)


def asked(
    recipe: FederatedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[tuple[int, ...], int]]:
    """(rows, first draw of the labels' generator) of every Fisher sum that a client is asked for."""
    found: list[tuple[tuple[int, ...], int]] = []
    original = step_zero.diagonal_fisher

    def recorded(model, head, split, ids, **options):
        state = options["generator"].get_state()
        found.append(
            (tuple(ids.tolist()), int(torch.randint(2**40, (), generator=options["generator"])))
        )
        options["generator"].set_state(state)
        assert not head.parameters()
        return original(model, head, split, ids, **options)

    monkeypatch.setattr(step_zero, "diagonal_fisher", recorded)
    begin(tmp_path, recipe)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("kind", ["average", "progressive"])
def test_calibration_asks_fresh_clients_for_fresh_examples(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(CALIBRATED, calibration=kind)
    groups = calibration_clients(recipe)
    assert [len(g) for g in groups] == [2] * 4
    assert sorted(k for g in groups for k in g) == list(range(8)), "no client is asked twice"
    assert groups != [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups != calibration_clients(replace(recipe, seed=9))
    found = asked(recipe, tmp_path, monkeypatch)
    shards = make_shards(tiny_task(), recipe)
    for (rows, _), k in zip(found, [k for g in groups for k in g], strict=True):
        assert len(rows) == 4
        assert set(rows) <= set(shards[k].tolist())
        assert rows != tuple(shards[k][:4].tolist())
    assert len({rows for rows, _ in found}) == len({draw for _, draw in found}) == 8
    assert asked(recipe, tmp_path, monkeypatch) == found


def test_fisher_sums_are_added_over_examples_and_not_averaged_over_clients(tmp_path: Path) -> None:
    """With exact labels and all examples of all clients, the mask is that of the whole data at once."""
    recipe = replace(
        RECIPE, participation_rate=1.0, sparsity_ratio=0.6, fisher_labels="exact", calibration_examples=10**6,
        sharding="dirichlet", alpha=0.3,
    )  # fmt: skip
    many = begin(tmp_path, recipe).setting.mask
    one = begin(tmp_path, replace(recipe, num_clients=1, sharding="iid", alpha=None)).setting.mask
    assert many is not None
    assert one is not None
    assert_same(many, one)
    assert sum(int(m.sum()) for m in many.values()) == round(
        0.4 * sum(m.numel() for m in many.values())
    )


def test_more_calibration_rounds_than_fresh_clients_is_an_error() -> None:
    (problem,) = replace(CALIBRATED, calibration_rounds=5).problems()
    assert "5 calibration rounds of 2 fresh clients each need more than the 8 clients" in problem


@pytest.mark.parametrize(
    "strategy", [n for n in MASK_STRATEGIES if not MASK_STRATEGIES[n].needs_scores]
)
def test_a_strategy_without_scores_asks_no_client_and_ignores_the_rounds(
    strategy: str, tmp_path: Path
) -> None:
    recipe = replace(CALIBRATED, mask_strategy=strategy, calibration_rounds=5)
    assert recipe.problems() == []
    assert calibration_clients(recipe) == []
    many, one = (
        begin(tmp_path, replace(recipe, calibration_rounds=rounds)).setting.mask
        for rounds in (5, 1)
    )
    assert many is not None
    assert one is not None
    assert_same(many, one)


@pytest.mark.parametrize("strategy", list(MASK_STRATEGIES))
@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_every_strategy_freezes_the_share_asked_for(
    strategy: str, scope: str, tmp_path: Path
) -> None:
    recipe = replace(
        CALIBRATED, mask_strategy=strategy, mask_scope=scope, sparsity_ratio=0.8, num_rounds=1
    )
    run = federate(plain(), tiny_task(), recipe, tmp_path / "run", device="cpu")
    start = run.rows[0]
    assert start["kept"] == pytest.approx(0.2 * start["parameters"], abs=2)
    mask = load_mask(tmp_path / "run" / "mask.safetensors", model_hash(FlatModel(plain())))
    assert sum(int(m.sum()) for m in mask.values()) == start["kept"]


def test_a_mask_from_a_file_is_used_and_one_of_another_model_refused(tmp_path: Path) -> None:
    model = FlatModel(plain())
    mask = {n: torch.zeros_like(t, dtype=torch.bool) for n, t in model.tensors().items()}
    mask["last.weight"][:, 3] = True
    save_mask(mask, tmp_path / "mask", model_hash(model))
    recipe = replace(RECIPE, mask_file=str(tmp_path / "mask"))
    held = begin(tmp_path, recipe).setting.mask
    assert held is not None
    assert_same(held, mask)
    run = federate(plain(), tiny_task(), recipe, tmp_path / "run", device="cpu")
    assert run.rows[0]["kept"] == 5
    assert mask_meta(tmp_path / "run" / "mask.safetensors") == {
        "strategy": None,
        "file": str(tmp_path / "mask"),
    }
    other = plain()
    with torch.no_grad():
        other.module.last.bias[0] += 1
    with pytest.raises(DeltaflError, match="was made for another model, or other weights of it"):
        begin(tmp_path, recipe, other)


def test_shards_are_a_function_of_the_seed_and_the_sharding_alone() -> None:
    task = tiny_task()
    first = make_shards(task, RECIPE)
    unlike = replace(
        RECIPE, lr=1.0, participation_rate=1.0, aggregator="median", head="ridge", local_steps=9
    )
    assert all(torch.equal(a, b) for a, b in zip(first, make_shards(task, unlike), strict=True))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(first, make_shards(task, replace(RECIPE, seed=8)), strict=True)
    )
    assert torch.equal(torch.cat(first).sort().values, torch.arange(50))
