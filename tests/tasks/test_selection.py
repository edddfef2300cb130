import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafl.tasks.selection import select, stratified


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
    rows = select({"train": labels, "test": labels}, 0, fraction)
    train, val = rows["train"][1], rows["val"][1]
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(len(labels)))
    assert set(labels[train]) == set(labels)


def test_own_val_is_kept_and_limits_hold_for_each_split():
    labels = {"train": np.arange(40) % 4, "val": np.arange(8) % 4, "test": np.arange(20) % 4}
    assert select(labels, 0)["val"][0] == "val"
    limited = select(labels, 0, limit=8)
    assert [len(limited[split][1]) for split in ("train", "val", "test")] == [8, 8, 8]
    assert np.array_equal(np.bincount(limited["train"][1] % 4), [2, 2, 2, 2])
    del labels["val"]
    whole, limited = select(labels, 3), select(labels, 3, limit=2)
    for split in ("train", "val"):  # a limit moves no row between train and val
        assert set(limited[split][1]) <= set(whole[split][1])
    for rows, expected in ((1000, 100), (60000, 5000), (4, 1)):
        labels = {"train": np.arange(rows) % 2, "test": np.arange(4)}
        assert len(select(labels, 0, 0.1)["val"][1]) == expected
