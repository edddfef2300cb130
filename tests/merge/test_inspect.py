"""Norms, cosines, signs, overlaps and layers against numpy, and the advice that follows from them."""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoint_files import make_world, save, tuned
from deltafl import Source, Update
from deltafl.algebra.deltas import Deltas
from deltafl.algebra.tensors import BLOCK
from deltafl.merge.inputs import open_updates
from deltafl.merge.inspect import (
    ADVICE,
    EXACT,
    LEADING,
    advise,
    cosines,
    inspect_models,
    layer_of,
    mean,
    measure,
)
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import MergeRecipe
from deltafl.progress import Progress
from deltafl.rules.weights import as_weights

LAYERS = {
    "embed": ["embed.w"],
    "layers.0": ["layers.0.a.w", "layers.0.b"],
    "layers.1": ["layers.1.a.w"],
}


def random_deltas(n: int = 3) -> list[dict[str, Tensor]]:
    """Deltas with many zeros, over three layers and a tensor longer than a block."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((9, 8), (2, BLOCK), (5,), (7, 3))
    names = [name for names in LAYERS.values() for name in names]

    def tensor(i: int, shape: tuple[int, ...]) -> Tensor:
        values = (i + 1) * torch.randn(shape, generator=draw)
        return values * (torch.rand(shape, generator=draw) < 0.7)

    return [{n: tensor(i, s) for n, s in zip(names, shapes, strict=True)} for i in range(n)]


def measured(deltas: Sequence[dict[str, Tensor]], *args: Any) -> dict[str, Tensor]:
    updates = [Update(d, Source(f"m{i}")) for i, d in enumerate(deltas)]
    return measure(Deltas(updates, as_weights(None, len(deltas))), *args)


def flat(delta: Mapping[str, Tensor], names: Sequence[str] | None = None) -> np.ndarray:
    return np.concatenate([delta[n].double().numpy().ravel() for n in names or delta])


@pytest.mark.parametrize("threads", [1, 3])
def test_products_and_signs_are_those_of_numpy(threads: int) -> None:
    deltas, told = random_deltas(), list[Progress]()
    found = measured(deltas, threads, told.append)
    assert list(found) == list(LAYERS)
    for layer, names in LAYERS.items():
        stacked = np.stack([flat(d, names) for d in deltas])
        signs = np.sign(stacked)
        wanted = np.stack([stacked @ stacked.T, abs(signs) @ abs(signs).T, signs @ signs.T])
        np.testing.assert_allclose(found[layer][:3].numpy(), wanted, rtol=1e-12, atol=1e-9)
    stacked = np.stack([flat(d) for d in deltas])
    units = stacked / np.linalg.norm(stacked, axis=1, keepdims=True)
    gram = torch.stack(list(found.values())).sum(0)[0]
    np.testing.assert_allclose(cosines(gram).numpy(), units @ units.T, rtol=1e-9, atol=1e-12)
    assert (told[-1].done, told[-1].total) == (4 * stacked.size, 4 * stacked.size)


def leading(delta: Tensor, n: int) -> np.ndarray:
    """(k, in): the definition, by numpy's SVD."""
    matrix = delta.double().numpy().reshape(len(delta), -1)
    _, s, directions = np.linalg.svd(matrix, full_matrices=False)
    rank = min(LEADING, max(1, min(matrix.shape) // n))
    return directions[:rank][s[:rank] > 1e-6 * np.linalg.norm(s)]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_overlaps_are_those_of_numpy(n: int) -> None:
    draw = torch.Generator().manual_seed(n)
    shapes = {
        "l.wide": (6, 20), "l.tall": (20, 6), "l.narrow": (2, 9), "l.conv": (6, 4, 3, 3),
        "l.grey": (8, 1, 4, 4), "l.depthwise": (8, 1, 3, 3), "l.bias": (7,), "l.large": (80, 90),
    }  # fmt: skip
    deltas = [
        {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        for _ in range(n)
    ]
    deltas[0]["l.tall"][:, 1:] = 0  # of rank 1
    deltas[1]["l.wide"].zero_()
    wanted = np.zeros((2, n, n))
    for name in shapes.keys() - {"l.depthwise", "l.bias"}:
        bases = [leading(delta[name], n) for delta in deltas]
        for (i, a), (j, b) in product(enumerate(bases), repeat=2):
            common = np.linalg.norm(a @ b.T) ** 2
            wanted[:, i, j] += common, len(a) * len(b) / a.shape[1]
    found = measured(deltas)["l"][3:]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-9)
    ranks = np.diagonal(wanted[0])
    shares = wanted / np.sqrt(np.multiply.outer(ranks, ranks))
    overlap, chance = (cosines(found[0], part) for part in found)
    np.testing.assert_allclose([overlap.numpy(), chance.numpy()], shares, rtol=1e-6, atol=1e-9)


def overlap_of(*matrices: Tensor) -> Tensor:
    return cosines(measured([{"a.w": matrix} for matrix in matrices])["a"][3])


@pytest.mark.parametrize("size", [8, EXACT + 44])
def test_equal_spaces_overlap_wholly_and_apart_ones_not_at_all(size: int) -> None:
    draw = torch.Generator().manual_seed(0)
    matrix, other = (torch.randn(size, size, generator=draw) for _ in range(2))
    matrix[:, size // 2 :] = 0
    other[:, : size // 2] = 0
    found = overlap_of(matrix[:, :2] @ other[:2], -3 * matrix[:, :2] @ other[:2], matrix)
    wanted = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)


def test_leading_directions_of_large_matrices_are_found_and_random_ones_overlap_by_chance() -> None:
    draw, shape = torch.Generator().manual_seed(0), (EXACT + 44, EXACT + 144)

    def falling() -> Tensor:
        u, v = (torch.linalg.qr(torch.randn(m, 300, generator=draw)).Q for m in shape)
        return u * 0.8 ** torch.arange(300) @ v.mT

    a, b = falling(), falling()
    deltas = [a, b, a + b]
    bases = [leading(delta, 3) for delta in deltas]
    wanted = [[np.linalg.norm(a @ b.T) ** 2 / LEADING for b in bases] for a in bases]
    assert wanted[0][2] > 0.3
    np.testing.assert_allclose(overlap_of(*deltas).numpy(), wanted, atol=1e-3)
    noise = [{"a.w": torch.randn(shape, generator=draw)} for _ in range(2)]
    found = measured(noise)["a"][3:]
    overlap, chance = (float(mean(cosines(found[0], part))) for part in found)
    assert chance == pytest.approx(LEADING / shape[1], rel=1e-6)
    assert overlap == pytest.approx(chance, rel=0.15)
    assert torch.equal(measured(noise, 3)["a"], measured(noise)["a"])


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("vision_model.encoder.layers.3.self_attn.q_proj.weight", "vision_model.encoder.layers.3"),
        ("visual.transformer.resblocks.2.attn.in_proj_weight", "visual.transformer.resblocks.2"),
        ("transformer.h.0.ln_1.weight", "transformer.h.0"),
        ("encoder.block.4.layer.1.DenseReluDense.wi.weight", "encoder.block.4"),
        ("embed.weight", "embed"),
    ],
)
def test_a_layer_is_the_part_of_the_name_up_to_its_number(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def inspected(root: Path, *models: str) -> dict[str, Any]:
    paths = [str(root / model) for model in models]
    plan = plan_merge(MergeRecipe.of(base=str(root / "base"), models=paths))
    return inspect_models(plan, open_updates(plan))


def test_the_result_tells_numbers_and_training_of_every_model(tmp_path: Path) -> None:
    world = make_world(tmp_path, 1)
    other, training = tuned(world.base, 2, 0.05), {"num_steps": 30, "lr": 0.1, "task": "t"}
    save(tmp_path / "m2", other, training=training)
    found = inspected(tmp_path, "m0", "m2")
    base = {n: t.double() for n, t in world.base.items() if t.is_floating_point()}
    a, b = ({n: m[n] - t for n, t in base.items()} for m in (world.models[0], other))
    norms = [float(np.linalg.norm(flat(delta))) for delta in (a, b)]
    assert found["norms"] == pytest.approx(dict(zip(("m0", "m2"), norms, strict=True)), rel=1e-6)
    cosine = float(flat(a) @ flat(b)) / norms[0] / norms[1]
    assert found["cosine"]["matrix"][0][1] == pytest.approx(cosine, abs=1e-6)
    embed, *layers = found["layers"]["m2"]
    assert embed == ["embed", pytest.approx(np.linalg.norm(flat(b, ["embed.weight"])), rel=1e-6)]
    assert [name for name, _ in layers] == ["layer.0", "norm"]
    unknown = dict.fromkeys(("epochs", "batch_size", "optimizer", "num_examples"))
    wanted = {"model": "m2", **training, **unknown, "norm": pytest.approx(norms[1], rel=1e-6)}
    assert found["training"][1] == wanted
    assert (found["tensors"], found["elements"]) == (5, flat(a).size)


def test_overlaps_are_told_of_pairs_and_of_layers_that_have_matrices(tmp_path: Path) -> None:
    world = make_world(tmp_path, 3)
    found = inspected(tmp_path, "m0", "m1", "m2")
    deltas = [{n: m[n].double() - t.double() for n, t in world.base.items()} for m in world.models]
    matrices = {"embed": "embed.weight", "layer.0": "layer.0.weight"}
    assert set(found["overlap_layers"]) == set(matrices)
    for layer, name in matrices.items():
        a, b, c = (leading(delta[name], 3) for delta in deltas)
        pairs = [np.linalg.norm(x @ y.T) ** 2 / len(x) for x, y in ((a, b), (a, c), (b, c))]
        wanted = [np.mean(pairs), len(a) / a.shape[1]]
        assert found["overlap_layers"][layer] == pytest.approx(wanted, abs=1e-6)
    overlaps = np.array(found["overlap"]["matrix"])
    np.testing.assert_allclose(overlaps.diagonal(), 1, atol=1e-9)
    low, high = sorted(value for value, _ in found["overlap_layers"].values())
    assert low <= overlaps[np.triu_indices(3, 1)].mean() <= high
    assert inspected(tmp_path, "m0")["overlap_layers"] == {}


def test_what_has_no_meaning_is_none_and_a_large_delta_is_noted(tmp_path: Path) -> None:
    world = make_world(tmp_path, 1)
    save(tmp_path / "same", world.base)
    found = inspected(tmp_path, "m0", "same")
    assert found["cosine"]["matrix"] == [[pytest.approx(1), None], [None, None]]
    assert found["sign_agreement"]["matrix"] == [[1, None], [None, None]]
    save(tmp_path / "far", tuned(world.base, 2, 2.0))
    assert '"far": its delta is 2 times as large' in str(inspected(tmp_path, "m0", "far")["notes"])


def advice(
    cosine: float = 0.05,
    norms: Sequence[float] = (1, 1),
    steps: Sequence[int | None] = (10, 10),
    agreement: float = 0.6,
    overlap: float = 0.3,
) -> str:
    n = len(norms)
    numbers = {"cosine": cosine, "sign_agreement": agreement, "overlap": overlap, "chance": 0.25}
    pairs = {
        name: torch.full((n, n), value, dtype=torch.float64).fill_diagonal_(1)
        for name, value in numbers.items()
    }
    sources = [Source(f"m{i}", num_steps=s) for i, s in enumerate(steps)]
    layers = {"embed": [0.2, 0.1], "layers.1": [0.77, 0.5], "layers.2": [0.7, 0.6]}
    return "\n".join(advise(sources, norms, pairs, layers))


@pytest.mark.parametrize(
    ("settings", "said", "unsaid"),
    [
        ({}, "validation data decides: deltafl search.", "fednova"),
        ({}, "sequential_regression: 128 of each gained 22.4 ± 0.5 points", "are many"),
        ({"norms": (1,) * 4, "steps": (1,) * 4}, "learned gained 10.5 ± 1.7", "are many"),
        ({"norms": (1,) * 5, "steps": (1,) * 5}, "5 models are many", "fednova"),
        ({"steps": (100, 400)}, "Local steps differ 4-fold: fednova", "--num-steps"),
        ({"steps": (10, None)}, "steps of 1 of 2 models are not known", "-fold: fednova"),
        ({"steps": (None, None)}, "steps of 2 of 2 models are not known", "-fold: fednova"),
        ({"norms": (1, 8)}, "Norms differ 8-fold, so m1 would dominate", "fednova"),
        ({"norms": (1, 8)}, "cclip bounds each delta (try rho from 1 to 8)", "fednova"),
        ({"norms": (1, 1.9)}, "", "cclip"),
        ({"cosine": 0.02}, "close to orthogonal (mean cosine 0.02)", "share"),
        ({"norms": (1,) * 4, "steps": (1,) * 4}, "between 1/4 and 1", "fednova"),
        ({"cosine": 0.8}, "point the same way (mean cosine 0.80): their mean is safe", "cclip"),
        ({"cosine": 0.4}, "share a part of their direction (mean cosine 0.40)", "orthogonal"),
        ({"cosine": -0.6}, "oppose each other (mean cosine -0.60): expect losses", "orthogonal"),
        ({"agreement": 0.52}, "on 52% of coordinates, 50% being chance: try fedgma", "cclip"),
        ({"agreement": 0.7}, "", "in sign on"),
        ({}, "overlap by 30% (25% by chance): sums interfere little", "tsv_m"),
        (
            {"overlap": 0.6},
            "overlap by 60% (25% by chance), most in layers.1 (77%): wudi, tsv_m and iso_c",
            "interfere little",
        ),
        ({"overlap": float("nan")}, "", "overlap by"),
        ({"norms": (1, 0)}, "m1: equal to the base; leave it out.", "search"),
        ({"norms": (1,), "steps": (10,)}, "One model: merging only scales its delta.", "search"),
    ],
)
def test_advice_follows_from_the_numbers(settings: dict[str, Any], said: str, unsaid: str) -> None:
    assert said in advice(**settings)
    assert unsaid not in advice(**settings)


def test_no_advice_lacks_a_number_and_its_points_are_those_of_the_results() -> None:
    results = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
    for _, least, below, text in ADVICE:
        assert least < below
        assert re.search(r"\d|\{", text)
        for points in re.findall(r"[\d.]+ ± \d+\.\d+", text):
            assert re.search(rf"[-+]{points} \|", results), points
