"""Norms, cosines, sign agreement and layers against numpy, and the advice that follows from numbers."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoint_files import make_world, save, toy, tuned
from deltafl import Source, Update
from deltafl.algebra.deltas import Deltas
from deltafl.algebra.tensors import BLOCK
from deltafl.errors import DeltaflError
from deltafl.merge.inputs import open_updates
from deltafl.merge.inspect import advise, cosines, inspect_models, layer_of, measure
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import MergeRecipe
from deltafl.progress import Progress
from deltafl.rules.weights import as_weights


def rows_of(deltas: Sequence[dict[str, Tensor]]) -> Deltas:
    updates = [Update(d, Source(f"m{i}")) for i, d in enumerate(deltas)]
    return Deltas(updates, as_weights(None, len(deltas)))


def random_deltas(n: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Deltas with many zeros, over three layers and a tensor longer than a block."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.w": (9, 8),
        "layers.0.a.w": (2, BLOCK),
        "layers.0.b": (5,),
        "layers.1.a.w": (7, 3),
    }

    def tensor(i: int, shape: tuple[int, ...]) -> Tensor:
        values = (i + 1) * torch.randn(shape, generator=draw)
        return values * (torch.rand(shape, generator=draw) < 0.7)

    return [{name: tensor(i, shape) for name, shape in shapes.items()} for i in range(n)]


def flat(delta: dict[str, Tensor], names: Sequence[str] | None = None) -> np.ndarray:
    return np.concatenate([delta[n].double().numpy().ravel() for n in names or delta])


@pytest.mark.parametrize("threads", [1, 3])
def test_norms_and_cosines_are_those_of_numpy(threads: int) -> None:
    deltas = random_deltas(3)
    stacked = np.stack([flat(d) for d in deltas])
    gram = torch.stack(list(measure(rows_of(deltas), threads).values())).sum(0)[0]
    np.testing.assert_allclose(gram.numpy(), stacked @ stacked.T, rtol=1e-12)
    np.testing.assert_allclose(
        gram.diagonal().sqrt().numpy(), np.linalg.norm(stacked, axis=1), rtol=1e-12
    )
    units = stacked / np.linalg.norm(stacked, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines(gram).numpy(), units @ units.T, rtol=1e-9, atol=1e-12)


def test_signs_are_compared_where_both_models_moved() -> None:
    deltas = random_deltas(3)
    _, moved, agreeing = torch.stack(list(measure(rows_of(deltas)).values())).sum(0)
    signs = np.sign(np.stack([flat(d) for d in deltas]))
    for i in range(3):
        for j in range(3):
            both = (signs[i] != 0) & (signs[j] != 0)
            assert moved[i, j] == both.sum()
            assert agreeing[i, j] == (both & (signs[i] == signs[j])).sum()


def test_each_layer_has_a_gram_matrix_of_its_own() -> None:
    deltas = random_deltas(2)
    found = measure(rows_of(deltas))
    layers = {
        "embed": ["embed.w"],
        "layers.0": ["layers.0.a.w", "layers.0.b"],
        "layers.1": ["layers.1.a.w"],
    }
    assert list(found) == list(layers)
    for layer, names in layers.items():
        stacked = np.stack([flat(d, names) for d in deltas])
        np.testing.assert_allclose(
            found[layer][0].numpy(), stacked @ stacked.T, rtol=1e-12, err_msg=layer
        )


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.11.mlp.up_proj.weight", "model.layers.11"),
        ("vision_model.encoder.layers.3.self_attn.q_proj.weight", "vision_model.encoder.layers.3"),
        ("visual.transformer.resblocks.2.attn.in_proj_weight", "visual.transformer.resblocks.2"),
        ("transformer.h.0.ln_1.weight", "transformer.h.0"),
        ("blocks.7.norm.bias", "blocks.7"),
        ("embed.weight", "embed"),
        ("cls_token", "cls_token"),
    ],
)
def test_a_layer_is_the_part_of_the_name_up_to_its_number(name: str, layer: str) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_delta_that_is_not_finite_is_an_error_that_names_model_and_tensor(bad: float) -> None:
    deltas = random_deltas(2)
    deltas[1]["layers.0.a.w"][1, 7] = bad
    with pytest.raises(DeltaflError, match=r'model "m1": tensor "layers\.0\.a\.w" .* NaN or Inf'):
        measure(rows_of(deltas))


def test_progress_counts_every_element_of_every_model() -> None:
    deltas = random_deltas(3)
    told: list[Progress] = []
    measure(rows_of(deltas), on_progress=told.append)
    numel = sum(t.numel() for d in deltas for t in d.values())
    assert (told[-1].done, told[-1].total) == (4 * numel, 4 * numel)


# Everything together


def inspected(root: Path, models: Sequence[str], **changes: object) -> dict[str, object]:
    paths = [str(root / model) for model in models]
    plan = plan_merge(MergeRecipe.of(base=str(root / "base"), models=paths, **changes))
    with open_updates(plan) as opened:
        return inspect_models(plan, opened)


def test_the_result_tells_numbers_and_training_of_every_model(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    save(
        tmp_path / "m2",
        tuned(world.base, 2, 0.05),
        training={"num_steps": 30, "num_examples": 9, "lr": 0.1, "task": "t"},
    )
    found = inspected(tmp_path, ["m0", "m2"])
    deltas = [
        {n: m[n].double() - t.double() for n, t in world.base.items() if t.is_floating_point()}
        for m in (world.models[0], tuned(world.base, 2, 0.05))
    ]
    norms = [float(np.linalg.norm(flat(d))) for d in deltas]
    assert found["norms"] == {
        "m0": pytest.approx(norms[0], rel=1e-6),
        "m2": pytest.approx(norms[1], rel=1e-6),
    }
    cosine = float(flat(deltas[0]) @ flat(deltas[1])) / norms[0] / norms[1]
    assert found["cosine"]["matrix"][0][1] == pytest.approx(cosine, abs=1e-6)  # type: ignore[index]
    assert found["layers"]["m2"] == [  # type: ignore[index]
        [layer, pytest.approx(np.linalg.norm(flat(deltas[1], names)), rel=1e-6)]
        for layer, names in {
            "embed": ["embed.weight"], "layer.0": ["layer.0.weight", "layer.0.bias"], "norm": ["norm.weight"],
        }.items()
    ]  # fmt: skip
    assert found["training"][1] == {  # type: ignore[index]
        "model": "m2", "task": "t", "lr": 0.1, "epochs": None, "batch_size": None, "optimizer": None,
        "num_steps": 30, "num_examples": 9, "norm": pytest.approx(norms[1], rel=1e-6),
    }  # fmt: skip
    assert (found["tensors"], found["elements"]) == (5, sum(t.numel() for t in deltas[0].values()))


def test_a_matrix_entry_that_has_no_meaning_is_none(tmp_path: Path) -> None:
    world = make_world(tmp_path, 1)
    save(tmp_path / "same", world.base)
    found = inspected(tmp_path, ["m0", "same"])
    assert found["cosine"]["matrix"] == [[pytest.approx(1), None], [None, None]]  # type: ignore[index]
    assert found["sign_agreement"]["matrix"] == [[1, None], [None, None]]  # type: ignore[index]
    assert found["advice"] == ["same: equal to the base; leave it out."]


def test_a_delta_as_large_as_the_base_is_noted(tmp_path: Path) -> None:
    world = make_world(tmp_path, 1)
    save(tmp_path / "far", tuned(world.base, 2, 2.0))
    assert any('"far": its delta is' in str(n) for n in inspected(tmp_path, ["m0", "far"])["notes"])  # type: ignore[union-attr]


# Advice


def advice(
    cosine: float | Tensor = 0.05, norms: Sequence[float] = (1, 1), steps: Sequence[int | None] = (10, 10),
    agreement: float = 0.6,
) -> str:  # fmt: skip
    n = len(norms)
    if not isinstance(cosine, Tensor):
        cosine = torch.full((n, n), cosine, dtype=torch.float64).fill_diagonal_(1)
    signs = torch.full((n, n), agreement, dtype=torch.float64).fill_diagonal_(1)
    sources = [Source(f"m{i}", num_steps=s) for i, s in enumerate(steps)]
    return "\n".join(advise(sources, norms, cosine, signs))


def test_norms_that_differ_8x_and_steps_that_differ_4x_suggest_fednova_and_cclip() -> None:
    said = advice(norms=(1, 8), steps=(100, 400))
    assert "Local steps differ 4-fold: fednova" in said
    assert "Norms differ 8-fold, so m1 would dominate a plain mean: cclip" in said
    assert "rho from 1 to 8" in said


def test_equal_norms_and_steps_suggest_neither_fednova_nor_cclip() -> None:
    said = advice()
    assert "fednova" not in said
    assert "cclip" not in said


def test_unknown_steps_name_the_flag_that_gives_them() -> None:
    for steps in ((None, None), (10, None)):
        said = advice(steps=steps)
        assert "--num-steps" in said
        assert "-fold: fednova" not in said


def test_deltas_that_are_near_orthogonal_suggest_the_sum() -> None:
    said = advice(0.02, norms=(1, 1, 1, 1), steps=(1, 1, 1, 1))
    assert "close to orthogonal (mean cosine 0.02)" in said
    assert "scaling_coef between 1/n = 0.25 and 1" in said


def test_deltas_that_point_the_same_way_suggest_the_mean() -> None:
    assert "point the same way (mean cosine 0.80)" in advice(0.8)


def test_deltas_that_oppose_each_other_are_warned_of() -> None:
    said = advice(-0.6)
    assert "oppose each other (mean cosine -0.60): expect losses" in said


def test_cosines_in_between_are_named_for_what_they_are() -> None:
    said = advice(0.4)
    assert "share a part of their direction (mean cosine 0.40)" in said
    assert "orthogonal" not in said


def test_signs_that_agree_by_chance_suggest_rules_that_look_at_signs() -> None:
    assert "on 52% of coordinates, near chance: try fedgma, median or ties" in advice(
        agreement=0.52
    )
    assert "near chance" not in advice(agreement=0.7)


def outlier(n: int) -> str:
    """Advice on n models of which the last opposes the others."""
    cosine = torch.full((n, n), 0.9, dtype=torch.float64)
    cosine[-1, :] = cosine[:, -1] = -0.2
    return advice(cosine.fill_diagonal_(1), [1] * n, [1] * n)


def test_an_outlier_is_named() -> None:
    assert "m4 points away from the others: median or multi_krum tolerate an outlier" in outlier(5)
    assert "points away" not in advice(0.1, [1] * 5, [1] * 5)


def test_multi_krum_is_not_advised_for_fewer_models_than_it_takes() -> None:
    assert "m3 points away from the others: median tolerates an outlier" in outlier(4)


def test_a_zero_delta_is_named_and_nothing_else_is_said() -> None:
    assert advice(norms=(1, 0)) == "m1: equal to the base; leave it out."


def test_one_model_needs_no_comparison() -> None:
    assert advice(norms=(1,), steps=(10,)) == "One model: merging only scales its delta."


def test_advice_ends_with_what_decides() -> None:
    assert advice().endswith("validation data decides: deltafl search.")


def test_advice_from_files_follows_from_their_numbers(tmp_path: Path) -> None:
    base = toy()
    save(tmp_path / "base", base)
    for i, (scale, steps) in enumerate([(0.001, 100), (0.008, 400)]):
        save(tmp_path / f"m{i}", tuned(base, i, scale), training={"num_steps": steps})
    said = "\n".join(inspected(tmp_path, ["m0", "m1"])["advice"])  # type: ignore[arg-type]
    for part in (
        "Local steps differ 4-fold: fednova",
        "Norms differ 8-fold, so m1",
        "cclip",
        "orthogonal",
        "near chance",
    ):
        assert part in said
