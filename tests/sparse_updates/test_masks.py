import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from deltafl.errors import DeltaflError
from deltafl.models import HeadRecipe
from deltafl.sparse.eligible import Eligible, eligible
from deltafl.sparse.masks import (
    describe_mask,
    load_mask,
    make_mask,
    mask_meta,
    model_hash,
    save_mask,
)
from deltafl.sparse.strategies import MASK_STRATEGIES
from tiny_models import tiny_images, tiny_net

SHAPES = {"a": (40,), "b": (7, 9), "scale": (), "none": (0, 3)}
PART = torch.arange(63).reshape(7, 9) % 5 != 0
ABLE = Eligible(SHAPES, {"b": PART})
TOTAL = 40 + int(PART.sum()) + 1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(seed: int, ties: bool = False, shapes=SHAPES):
    draw = seeded(seed)
    if ties:
        return {n: torch.randint(-2, 3, s, generator=draw).float() for n, s in shapes.items()}
    return {n: torch.randn(s, generator=draw) for n, s in shapes.items()}


def mask_of(strategy, sparsity=0.7, scope="global", seed=0, able=ABLE, scores=None, weights=None):
    return make_mask(
        strategy,
        keep=1 - sparsity,
        scope=scope,
        eligible=able,
        scores=scores or {n: t.square() for n, t in tensors(1).items()},
        weights=weights or tensors(2),
        generator=seeded(seed),
    )


def size(mask) -> int:
    return sum(int(kept.sum()) for kept in mask.values())


def one(strategy, score, weight, sparsity=0.5):
    able = Eligible({"w": tuple(score.shape)})
    return mask_of(strategy, sparsity, able=able, scores={"w": score}, weights={"w": weight})[
        "w"
    ].tolist()


@given(
    strategy=st.sampled_from(sorted(MASK_STRATEGIES)),
    sparsity=st.floats(0, 0.98),
    scope=st.sampled_from(["global", "per_layer"]),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_exactly_k_eligible_coordinates_are_kept(strategy, sparsity, scope, ties, seed):
    scores = {n: t.square() for n, t in tensors(seed, ties).items()}
    mask = mask_of(strategy, sparsity, scope, seed, scores=scores, weights=tensors(seed + 1, ties))
    assert list(mask) == list(SHAPES)
    assert all(mask[n].dtype == torch.bool and mask[n].shape == s for n, s in SHAPES.items())
    assert not (mask["b"] & ~PART).any()
    if scope == "global":
        assert size(mask) == round((1 - sparsity) * TOTAL)
    else:
        assert {n: int(m.sum()) for n, m in mask.items()} == {
            n: round((1 - sparsity) * ABLE.numel(n)) for n in SHAPES
        }


def test_each_strategy_against_a_sort():
    """The order of numpy's float64 argsort; no two keys are alike."""
    scores, weights = {n: t.square() for n, t in tensors(1).items()}, tensors(2)
    flags = np.concatenate([ABLE.of(n).numpy().ravel() for n in SHAPES])

    def flat(values):
        return np.concatenate([v.double().numpy().ravel() for v in values.values()])

    keys = {
        "least_sensitive": flat(scores),
        "most_sensitive": -flat(scores),
        "lowest_magnitude": np.abs(flat(weights)),
        "highest_magnitude": -np.abs(flat(weights)),
    }
    for strategy, key in keys.items():
        order = np.argsort(np.where(flags.astype(bool), key, np.inf))[: round(0.3 * TOTAL)]
        expected = np.zeros(len(key), bool)
        expected[order] = True
        mask = mask_of(strategy, scores=scores, weights=weights)
        assert (np.concatenate([m.numpy().ravel() for m in mask.values()]) == expected).all(), (
            strategy
        )


def test_sparsity_is_the_frozen_fraction_and_names_mean_what_they_say():
    score, weight = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([-4.0, 0.1, 3.0, -0.2])
    assert one("least_sensitive", score, weight, 0.75) == [True, False, False, False]
    assert one("most_sensitive", score, weight, 0.75) == [False, False, False, True]
    assert one("lowest_magnitude", score, weight) == [False, True, False, True]
    assert one("highest_magnitude", score, weight) == [True, False, True, False]
    assert one("least_sensitive", score, weight, 0.0) == [True] * 4


@pytest.mark.parametrize("strategy", ["lowest_magnitude", "highest_magnitude", "random"])
def test_strategies_without_scores_do_not_read_them(strategy):
    with_nan = {n: t * math.nan for n, t in tensors(1).items()}
    mask = mask_of(strategy, scores=with_nan)
    plain = make_mask(
        strategy,
        keep=1 - 0.7,
        scope="global",
        eligible=ABLE,
        scores=None,
        weights=tensors(2),
        generator=seeded(),
    )
    assert all(torch.equal(mask[n], plain[n]) for n in mask)


def test_ties_are_drawn_by_the_generator():
    scores = {n: torch.zeros(s) for n, s in SHAPES.items()}
    first, again, other = (mask_of("least_sensitive", seed=s, scores=scores) for s in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)
    # Taking the first ones would leave the last tensors empty: 30 % of 40 + 50 + 1 fit into the first.
    assert first["b"].any()
    assert other["b"].any()


def test_random_masks_are_uniform():
    counts = sum(mask_of("random", 0.5, seed=s)["a"].int() for s in range(400))
    # 400 draws with probability 1/2: five standard deviations are 50.
    assert ((counts - 200).abs() < 50).all()


def test_selection_is_exact_above_2_to_the_24():
    numel = 2**24 + 10
    able = Eligible({"w": (numel,)})
    weights = {"w": torch.ones(numel)}
    weights["w"][5:15] = 0
    kept = mask_of("lowest_magnitude", 1 - (2**23 + 3) / numel, able=able, weights=weights)["w"]
    assert int(kept.sum()) == 2**23 + 3
    assert kept[5:15].all()


def test_16_bit_weights_and_float64_scores():
    weights = {n: t.bfloat16() for n, t in tensors(2).items()}
    as_float = {n: t.float() for n, t in weights.items()}
    one_, two = (
        mask_of("lowest_magnitude", weights=weights),
        mask_of("lowest_magnitude", weights=as_float),
    )
    assert all(torch.equal(one_[n], two[n]) for n in one_)
    close = 1 + torch.arange(4, dtype=torch.float64) * 1e-12  # one float32
    assert one("least_sensitive", close, torch.ones(4)) == [True, True, False, False]


def test_arguments_are_not_modified():
    scores, weights, part = tensors(1), tensors(2), PART.clone()
    mask_of("most_sensitive", scores=scores, weights=weights)
    assert torch.equal(PART, part)
    assert all(
        torch.equal(scores[n], tensors(1)[n]) and torch.equal(weights[n], tensors(2)[n])
        for n in SHAPES
    )


@pytest.mark.parametrize("sparsity", [1.0, -0.1, math.nan, 1.5])
def test_sparsity_outside_is_refused(sparsity):
    with pytest.raises(DeltaflError, match="sparsity is"):
        mask_of("random", sparsity)


def test_mistakes_are_named():
    scores = tensors(1)
    scores["b"][0, 1] = math.nan
    with pytest.raises(DeltaflError, match='scores of "b" hold NaN'):
        mask_of("least_sensitive", scores=scores)
    ineligible = tensors(1)
    ineligible["b"][0, 0] = math.nan
    mask_of("least_sensitive", scores=ineligible)
    with pytest.raises(DeltaflError, match='scores lack "a"'):
        mask_of("least_sensitive", scores={n: t for n, t in tensors(1).items() if n != "a"})
    with pytest.raises(DeltaflError, match=r'weights of "a" are \(3,\), the tensor is \(40,\)'):
        mask_of("random", weights={**tensors(2), "a": torch.ones(3)})
    with pytest.raises(DeltaflError, match='did you mean "least_sensitive"'):
        mask_of("least_sensitve")
    with pytest.raises(DeltaflError, match="none would be kept"):
        mask_of("random", 0.999)
    with pytest.raises(DeltaflError, match="least_sensitive needs scores"):
        make_mask(
            "least_sensitive",
            keep=0.5,
            scope="global",
            eligible=ABLE,
            scores=None,
            weights=tensors(2),
            generator=seeded(),
        )


def test_least_sensitive_takes_no_key_bias_of_a_vit():
    net = tiny_net()
    able = eligible(net)
    scores = {n: torch.ones_like(t) for n, t in net.trained.items()}
    keys = [n for n in scores if n.endswith("k_proj.bias")]
    for name in keys:
        scores[name].zero_()
    mask = mask_of("least_sensitive", 0.9, able=able, scores=scores, weights=net.trained)
    assert size(mask) == round((1 - 0.9) * able.total)
    assert not any(mask[name].any() for name in keys)
    assert describe_mask(mask, able)[keys[0]].fraction == 0


def with_head():
    net = tiny_net()
    net.prepare(tiny_images(), HeadRecipe(head="linear", train_head=True))
    return net


def test_a_trained_head_trains_whole_whatever_the_mask(tmp_path):
    net, frozen = with_head(), tiny_net()
    able = eligible(net)
    assert list(able.whole) == ["head.weight", "head.bias"]
    assert able.shapes.keys() | able.whole.keys() == net.slices.keys()
    mask = mask_of("random", 0.9, able=able, weights=net.trained)
    assert mask.keys() == net.slices.keys()
    assert mask["head.weight"].all()
    assert size(mask) == round((1 - 0.9) * able.total) + 3 * 16 + 3
    assert model_hash(net) == model_hash(frozen)
    path = save_mask(mask, tmp_path / "m", model_hash(net))
    assert load_mask(path, frozen).keys() == frozen.slices.keys()
    again = load_mask(save_mask(load_mask(path, frozen), tmp_path / "n", model_hash(net)), net)
    assert again.keys() == mask.keys()
    assert all(torch.equal(again[n], mask[n]) for n in mask)


def test_description_splits_fused_tensors():
    part = torch.tensor([True] * 4 + [False] * 4 + [True] * 4)
    able = Eligible({"qkv": (12,), "w": (2, 2)}, {"qkv": part}, frozenset({"qkv"}))
    mask = {
        "qkv": torch.tensor([True, False, False, False] + [False] * 4 + [True] * 4),
        "w": torch.eye(2).bool(),
    }
    rows = {name: tuple(row) for name, row in describe_mask(mask, able).items()}
    assert rows == {"qkv[q]": (1, 4), "qkv[k]": (0, 0), "qkv[v]": (4, 4), "w": (2, 4)}
    assert describe_mask(mask, able)["qkv[q]"].fraction == 0.25


def test_a_saved_mask_loads_bit_for_bit(tmp_path):
    mask = mask_of("random")
    path = save_mask(
        mask, tmp_path / "runs" / "mask.safetensors", "abc", {"strategy": "random", "seed": 3}
    )
    loaded = load_mask(path, None)
    assert list(loaded) == list(mask)
    assert all(torch.equal(loaded[n], mask[n]) for n in mask)
    assert mask_meta(path) == {"strategy": "random", "seed": 3}
    assert sorted(p.name for p in path.parent.iterdir()) == ["mask.safetensors"]


def test_masks_are_packed(tmp_path):
    mask = {"w": torch.rand(80_000, generator=seeded()) < 0.1}
    assert save_mask(mask, tmp_path / "m", "abc").stat().st_size < 80_000 / 8 + 600


def test_a_mask_of_another_model_is_refused(tmp_path):
    net = tiny_net()
    mask = mask_of("random", able=eligible(net), weights=net.trained)
    path = save_mask(mask, tmp_path / "m", model_hash(net))
    loaded = load_mask(path, tiny_net())
    assert list(loaded) == list(net.slices)
    assert all(torch.equal(loaded[n], mask[n]) for n in mask)
    with torch.no_grad():
        net.flat[7] += 1e-6
    with pytest.raises(DeltaflError, match="another model"):
        load_mask(path, net)


def test_a_mask_in_the_names_of_the_models_file_loads(tmp_path):
    """As masks were written before heads were inside of models."""
    net = tiny_net()
    mask = mask_of("random", able=eligible(net), weights=net.trained)
    names = {n: n.removeprefix("encoder.") for n in mask}
    old = save_mask({names[n]: m for n, m in mask.items()}, tmp_path / "old", model_hash(net))
    loaded = load_mask(old, net)
    assert list(loaded) == list(mask)
    assert all(torch.equal(loaded[n], mask[n]) for n in mask)
    odd = save_mask({f"x.{n}": m for n, m in mask.items()}, tmp_path / "odd", model_hash(net))
    with pytest.raises(DeltaflError, match="in another way"):
        load_mask(odd, net)


def test_the_hash_is_of_names_shapes_and_values():
    net = tiny_net()
    first = model_hash(net)
    # sha256 of this model before heads were inside of models: saved masks stay valid.
    assert len(first) == 64
    assert first == model_hash(tiny_net())
    assert first != model_hash(tiny_net(1))
    renamed = tiny_net()
    renamed.file_name = lambda name: f"x{name}"  # type: ignore[method-assign]
    assert model_hash(renamed) != first
    frozen = tiny_net()
    frozen.module.get_parameter("encoder.layernorm.bias").requires_grad_(False)
    assert model_hash(frozen) != first


def test_files_that_are_no_masks_are_refused(tmp_path):
    with pytest.raises(DeltaflError, match="cannot be read"):
        load_mask(tmp_path / "absent", None)
    (tmp_path / "text").write_text("no safetensors")
    with pytest.raises(DeltaflError, match="cannot be read"):
        load_mask(tmp_path / "text", None)
    save_file({"w": np.ones(3)}, tmp_path / "weights")
    with pytest.raises(DeltaflError, match="is not a mask"):
        load_mask(tmp_path / "weights", None)
    about = {"format": "mask 1", "model_hash": "abc", "shapes": {"w": [9]}, "meta": {}}
    save_file(
        {"w": np.ones(1, np.uint8)}, tmp_path / "short", metadata={"deltafl": json.dumps(about)}
    )
    with pytest.raises(DeltaflError, match='"w" has not the bits'):
        load_mask(tmp_path / "short", None)


def test_everything_ineligible_keeps_nothing():
    able = replace(ABLE, partial={n: torch.zeros(s, dtype=torch.bool) for n, s in SHAPES.items()})
    with pytest.raises(DeltaflError, match="of 0 eligible"):
        mask_of("random", 0.0, able=able)
