import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafl.tasks.selection import Selection, hold_out, select, stratified


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(0, 90), st.integers(0, 3))
def test_stratified_is_exact_and_proportional(labels, count, seed):
    labels = np.array(labels)
    rows = stratified(labels, count, np.random.default_rng(seed))
    assert len(rows) == min(count, len(labels))
    assert len(np.unique(rows)) == len(rows)
    for c in np.unique(labels):
        share = (labels == c).sum() * len(rows) / len(labels)
        assert np.floor(share - 1e-6) <= (labels[rows] == c).sum() <= np.ceil(share + 1e-6)


def test_every_row_can_be_chosen():
    labels = np.repeat(np.arange(3), 10)
    seen = {
        int(r) for seed in range(60) for r in stratified(labels, 6, np.random.default_rng(seed))
    }
    assert seen == set(range(30))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=12, max_size=80), st.floats(0.01, 0.9))
def test_held_out_rows_divide_train_and_empty_no_class(labels, fraction):
    labels = np.array(labels)
    train, val = hold_out(labels, fraction, 5000, np.random.default_rng(0))
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(len(labels)))
    assert set(labels[train]) == set(labels)


@pytest.mark.parametrize(
    ("rows", "most", "expected"), [(1000, 5000, 100), (1000, 30, 30), (4, 5000, 1)]
)
def test_val_is_a_tenth_or_the_cap(rows, most, expected):
    _, val = hold_out(np.arange(rows) % 2, 0.1, most, np.random.default_rng(0))
    assert len(val) == expected


def test_own_val_is_kept_and_limits_hold_for_each_split():
    labels = {"train": np.arange(40) % 4, "val": np.arange(8) % 4, "test": np.arange(20) % 4}
    assert select(labels, Selection())["val"][0] == "val"
    limited = select(labels, Selection(limit=8))
    assert {split: len(rows) for split, (_, rows) in limited.items()} == {
        "train": 8,
        "val": 8,
        "test": 8,
    }
    assert np.array_equal(np.bincount(limited["train"][1] % 4), [2, 2, 2, 2])


def test_limit_does_not_move_rows_between_train_and_val():
    labels = {"train": np.arange(100) % 4, "test": np.arange(8) % 4}
    whole, limited = select(labels, Selection(seed=3)), select(labels, Selection(seed=3, limit=4))
    for split in ("train", "val"):
        assert set(limited[split][1]) <= set(whole[split][1])
