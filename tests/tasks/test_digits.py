import numpy as np
import pytest
import torch
from dataset_files import load
from sklearn.datasets import load_digits

from checkpoint_files import fails
from deltafl.tasks.digits import VARIANTS, partition

LABELS = load_digits(return_X_y=True)[1]


def test_no_row_is_in_two_places_and_every_part_is_stratified():
    parts = partition(LABELS)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1797))
    assert [len(rows) for rows in parts] == [597, 100, 100, 600, 200, 200]
    for rows in parts:
        # Classes have 174 to 183 of 1,797 rows, and each part is drawn from what the last one left.
        assert np.ptp(np.bincount(LABELS[rows], minlength=10) / len(rows)) < 0.02


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_variant_is_a_deterministic_change_of_every_image(name):
    images = np.random.default_rng(0).random((5, 16, 16))
    before = images.copy()
    changed = VARIANTS[name](images)
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert np.array_equal(images, before)
    task, again = (load(f"digits:{name}", 16, 1, seed) for seed in (0, 9))
    plain = load("digits", 16, 1)
    assert (task.name, task.class_names) == (f"digits_{name}", tuple("0123456789"))
    for split in ("train", "val", "test"):
        images = task.splits[split].images
        assert images.shape[1:] == (1, 16, 16)
        assert torch.equal(images, again.splits[split].images)
        if name == "pretrain":
            continue
        assert torch.equal(task.groups(split), plain.groups(split))
        same = (images == plain.splits[split].images).flatten(1).all(1)
        assert same.all() if name == "plain" else not same.any()


def test_variants_differ_from_each_other_leave_no_cache_and_a_misspelt_one_is_told(tmp_path):
    names = VARIANTS.keys() - {"plain", "pretrain"}
    images = {load(f"digits:{n}", 16, 1).splits["test"].images.numpy().tobytes() for n in names}
    assert len(images) == len(names) >= 8
    assert not (tmp_path / "cache").exists()
    fails('unknown variant of digits "invert"; did you mean "inverted"', load, "digits:invert")
