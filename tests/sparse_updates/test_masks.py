import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from checkpoint_files import fails
from deltafl.models import HeadRecipe
from deltafl.sparse.eligible import eligible
from deltafl.sparse.masks import choose_mask, completed, load_mask, model_hash, save_mask
from deltafl.sparse.strategies import MASK_STRATEGIES
from tiny_models import tiny_images, tiny_net

SHAPES = {"a": (40,), "b": (7, 9), "scale": (), "none": (0, 3)}
ABLE = {n: torch.ones(s, dtype=torch.bool) for n, s in SHAPES.items()}
ABLE["b"] = torch.arange(63).reshape(7, 9) % 5 != 0


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(seed: int, ties: bool = False):
    draw = seeded(seed)
    if ties:
        return {n: torch.randint(-2, 3, s, generator=draw).float() for n, s in SHAPES.items()}
    return {n: torch.randn(s, generator=draw) for n, s in SHAPES.items()}


def mask_of(strategy, values=None, sparsity=0.7, scope="global", seed=0, able=ABLE, **options):
    values = values or tensors(1)
    return choose_mask(
        strategy, values, able, keep=1 - sparsity, scope=scope, generator=seeded(seed), **options
    )


def flat(values) -> np.ndarray:
    return np.concatenate([v.double().numpy().ravel() for v in values.values()])


def same(one, two) -> bool:
    return list(one) == list(two) and all(torch.equal(one[n], two[n]) for n in one)


@given(
    strategy=st.sampled_from(sorted(MASK_STRATEGIES)),
    sparsity=st.floats(0, 0.98),
    scope=st.sampled_from(["global", "per_layer"]),
    ties=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_exactly_k_eligible_coordinates_are_kept(strategy, sparsity, scope, ties, dtype, seed):
    values = {n: t.to(dtype) for n, t in tensors(seed, ties).items()}
    given = {n: t.clone() for n, t in values.items()}
    mask = mask_of(strategy, values, sparsity, scope, seed)
    assert same(values, given)
    assert {n: (m.dtype, tuple(m.shape)) for n, m in mask.items()} == {
        n: (torch.bool, s) for n, s in SHAPES.items()
    }
    assert not any((mask[n] & ~ABLE[n]).any() for n in mask)
    counts, sizes = ([int(m.sum()) for m in masks.values()] for masks in (mask, ABLE))
    if scope == "global":
        assert sum(counts) == round((1 - sparsity) * sum(sizes))
    else:
        assert counts == [round((1 - sparsity) * n) for n in sizes]


@pytest.mark.parametrize(
    ("strategy", "key"),
    [
        ("least_sensitive", lambda v: v),
        ("most_sensitive", lambda v: -v),
        ("lowest_magnitude", np.abs),
        ("highest_magnitude", lambda v: -np.abs(v)),
    ],
)
def test_each_strategy_against_a_sort(strategy, key):
    """The order of numpy's float64 argsort; no two keys are alike."""
    keys = np.where(flat(ABLE).astype(bool), key(flat(tensors(1))), np.inf)
    expected = np.zeros(len(keys), bool)
    expected[np.argsort(keys)[: round(0.3 * flat(ABLE).sum())]] = True
    assert (flat(mask_of(strategy)).astype(bool) == expected).all()


def test_ties_and_random_masks_are_drawn_by_the_generator():
    scores = {n: torch.zeros(s) for n, s in SHAPES.items()}
    first, again, other = (mask_of("least_sensitive", scores, seed=s) for s in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)
    # Taking the first ones would leave the last tensors empty: 30 % of 40 + 50 + 1 fit into the first.
    assert first["b"].any()
    assert other["b"].any()
    counts = sum(mask_of("random", sparsity=0.5, seed=s)["a"].int() for s in range(400))
    # 400 draws with probability 1/2: five standard deviations are 50.
    assert ((counts - 200).abs() < 50).all()


def test_mistakes_are_named():
    scores = tensors(1)
    scores["b"][0, 0] = math.nan  # not eligible
    mask_of("least_sensitive", scores)
    scores["b"][0, 1] = math.nan
    fails('scores of "b" hold NaN', mask_of, "least_sensitive", scores)
    fails('weights of "b" hold NaN', mask_of, "lowest_magnitude", scores)
    mask_of("random", scores)
    fails("of 91 eligible coordinates none would be kept", mask_of, "random", sparsity=0.999)


def test_a_trained_head_trains_whole_whatever_the_mask(tmp_path):
    net, frozen = tiny_net(), tiny_net()
    net.prepare(tiny_images(), HeadRecipe(head="linear", train_head=True))
    able = eligible(net)
    assert net.slices.keys() - able.keys() == {"head.weight", "head.bias"}
    mask = completed(mask_of("random", net.trained, 0.9, able=able), net)
    assert list(mask) == list(net.slices)
    assert mask["head.weight"].all()
    assert mask["head.bias"].all()
    assert model_hash(net) == model_hash(frozen)
    path = save_mask(mask, tmp_path / "m", model_hash(net), {})
    bare = load_mask(path, frozen)[0]
    assert list(bare) == list(frozen.slices)
    assert same(load_mask(save_mask(bare, tmp_path / "n", model_hash(net), {}), net)[0], mask)


def test_a_saved_mask_loads_bit_for_bit_and_is_packed(tmp_path):
    mask = mask_of("random") | {"w": torch.rand(80_000, generator=seeded()) < 0.1}
    meta = {"strategy": "random", "seed": 3}
    path = save_mask(mask, tmp_path / "runs" / "mask.safetensors", "abc", meta)
    loaded, told = load_mask(path, None)
    assert same(loaded, mask)
    assert told == meta
    assert [p.name for p in path.parent.iterdir()] == ["mask.safetensors"]
    assert path.stat().st_size < 80_000 / 8 + 1000


def test_selection_is_exact_above_2_to_the_24_and_in_float64():
    numel = 2**24 + 10
    weights = {"w": torch.ones(numel)}
    weights["w"][5:15] = 0
    able = {"w": torch.ones(numel, dtype=torch.bool)}
    kept = mask_of("lowest_magnitude", weights, 1 - (2**23 + 3) / numel, able=able)["w"]
    assert int(kept.sum()) == 2**23 + 3
    assert kept[5:15].all()
    close = {"w": 1 + torch.arange(4, dtype=torch.float64) * 1e-12}  # one float32
    kept = mask_of("least_sensitive", close, 0.5, able={"w": able["w"][:4]})["w"]
    assert kept.tolist() == [True, True, False, False]


def test_a_mask_of_another_model_and_files_that_are_no_masks_are_refused(tmp_path):
    net, renamed, frozen = tiny_net(), tiny_net(), tiny_net()
    mask = mask_of("random", net.trained, able=eligible(net))
    path = save_mask(mask, tmp_path / "m", model_hash(net), {})
    assert same(load_mask(path, tiny_net())[0], mask)
    with torch.no_grad():
        net.flat[7] += 1e-6
    renamed.file_name = lambda name: f"x{name}"  # type: ignore[method-assign]
    frozen.module.get_parameter("encoder.layernorm.bias").requires_grad_(False)
    for other in (net, renamed, frozen):
        fails("another model", load_mask, path, other)
    (tmp_path / "text").write_text("no safetensors")
    save_file({"w": np.ones(3)}, tmp_path / "weights")
    told = {"absent": "cannot be read", "text": "cannot be read", "weights": "is not a mask"}
    for name, said in told.items():
        fails(said, load_mask, tmp_path / name, None)
