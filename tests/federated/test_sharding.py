"""Sharding: disjoint, complete, and what each family promises."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from checkpoint_files import fails
from deltafl.errors import DeltaflError
from deltafl.federated.sharding import ShardingRecipe, shard, shard_counts

totals_of_few = st.lists(st.integers(1, 40), min_size=1, max_size=8)
seeds = st.integers(0, 2**40)


def labels_of(totals: Sequence[int], seed: int = 0) -> Tensor:
    labels = torch.arange(len(totals)).repeat_interleave(torch.tensor(list(totals)))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


IID: dict[str, Any] = {"sharding": "iid"}


def non_iid(nc: int, **settings: Any) -> dict[str, Any]:
    return {"sharding": "non_iid", "nc": nc, **settings}


def dirichlet(alpha: float) -> dict[str, Any]:
    return {"sharding": "dirichlet", "alpha": alpha}


def shards_of(
    labels: Tensor, num_clients: int, settings: dict[str, Any], seed: int = 0
) -> tuple[Tensor, ...]:
    recipe = ShardingRecipe.of(num_clients=num_clients, **settings)
    return shard(labels, recipe, torch.Generator().manual_seed(seed))


def counts_of(
    totals: Sequence[int], num_clients: int, sharding: dict[str, Any], seed: int = 0
) -> np.ndarray:
    """int64 (K, L), counted here and not by `shard_counts`, after checking the form of the shards."""
    labels = labels_of(totals, seed)
    shards = shards_of(labels, num_clients, sharding, seed)
    assert len(shards) == num_clients
    for rows in shards:
        assert rows.dtype == torch.int64
        assert (rows.diff() > 0).all()
    everything = torch.cat(shards)
    assert len(everything.unique()) == len(everything)
    return np.stack([np.bincount(labels[rows].numpy(), minlength=len(totals)) for rows in shards])


def spread(sizes: np.ndarray) -> int:
    return int(sizes.max() - sizes.min())


@given(
    totals_of_few,
    st.integers(1, 30),
    seeds,
    st.sampled_from([IID, dirichlet(0.2), dirichlet(1e-320), dirichlet(1e308)]),
)
def test_every_sample_has_one_client_and_sizes_differ_by_at_most_one(
    totals, num_clients, seed, sharding
):
    assume(sum(totals) >= num_clients)
    counts = counts_of(totals, num_clients, sharding, seed)
    assert counts.sum(0).tolist() == totals
    assert spread(counts.sum(1)) <= 1
    if sharding == IID:
        assert np.ptp(counts, axis=0).max() <= 1


@pytest.mark.parametrize("alpha", [0.3, 2.0, 50.0])
def test_dirichlet_hsu_draws_mixes_of_the_right_variance(alpha: float):
    """Two clients, two equal classes, where nothing runs out before the second client: a share x / n is binomial
    around q ~ Beta(a / 2, a / 2), so E (x / n - 1/2)^2 = v + (1/4 - v) / n with v = 1 / (4 (a + 1))."""
    n, v = 60, 1 / (4 * (alpha + 1))
    shares = np.array(
        [counts_of([n, n], 2, dirichlet(alpha), seed)[0, 0] / n for seed in range(600)]
    )
    assert ((shares - 0.5) ** 2).mean() == pytest.approx(v + (0.25 - v) / n, rel=0.2)
    assert shares.mean() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("nc", [1, 5, 10, 50, 100])
def test_cifar_100_with_100_clients_is_exact(nc: int):
    labels = labels_of([450] * 100)  # 500 a class, 50 of them held out
    shards = shards_of(labels, 100, non_iid(nc))
    told = shard_counts(shards, labels, 100)
    held = told["counts"]
    assert told["sizes"].tolist() == [450] * 100
    assert told["classes"].tolist() == (held > 0).sum(0).tolist() == [nc] * 100
    assert set(held[held > 0].tolist()) == {450 // nc, -(-450 // nc)}
    assert (told["duplicates"], told["left_out"].tolist()) == (0, [0] * 100)
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(45000))


@st.composite
def non_iid_cases(draw: st.DrawFn, most_clients: int = 9, most_classes: int = 7, most: int = 60):
    """Totals, K and nc that can be done, balanced or not."""
    num_classes = draw(st.integers(1, most_classes))
    num_clients, nc = draw(st.integers(1, most_clients)), draw(st.integers(1, num_classes))
    assume(num_clients * nc >= num_classes)
    least = -(-num_clients * nc // num_classes)
    totals = draw(
        st.lists(st.integers(least, least + most), min_size=num_classes, max_size=num_classes)
    )
    return totals, num_clients, nc


@given(non_iid_cases(), seeds)
def test_non_iid_clients_hold_exactly_nc_classes_and_everything_is_used(case, seed):
    totals, num_clients, nc = case
    counts = counts_of(totals, num_clients, non_iid(nc), seed)
    assert counts.sum(0).tolist() == totals
    assert ((counts > 0).sum(1) == nc).all()
    holders = (counts > 0).sum(0)
    assert set(holders) <= {num_clients * nc // len(totals), -(-num_clients * nc // len(totals))}
    large, small = [
        [t for t, h in zip(totals, holders, strict=True) if h == n]
        for n in (holders.max(), holders.min())
    ]
    assert holders.max() == holders.min() or min(large) >= max(small)


@given(non_iid_cases(most_clients=24, most_classes=13, most=300), seeds)
def test_sizes_differ_by_at_most_a_chunk(case, seed):
    totals, num_clients, nc = case
    counts = counts_of(totals, num_clients, non_iid(nc), seed)
    assert spread(counts.sum(1)) <= counts.max() + (counts.max() <= 3)
    for column in counts.T:
        assert spread(column[column > 0]) <= 1


def test_who_holds_a_class_together_looks_random():
    """Taking the largest quota first pairs clients into complements; the trades undo that. Of 3 out of 6 classes, two
    random clients hold complements with probability 1 / 20, and the next client of the plain order with 1."""
    held = [counts_of([40] * 6, 8, non_iid(3), seed) > 0 for seed in range(80)]
    pairs = [(h[a] != h[b]).all() for h in held for a in range(8) for b in range(a)]
    assert np.mean(pairs) < 0.12


def test_missing_classes_are_the_smallest_and_are_told():
    labels = labels_of([9, 30, 8, 30, 7])
    shards = shards_of(labels, 3, non_iid(1, allow_missing_classes=True))
    told = shard_counts(shards, labels, 5)
    assert told["left_out"].tolist() == [0, 0, 8, 0, 7]
    assert told["counts"].sum(0).tolist() == [9, 30, 0, 30, 0]
    assert told["classes"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("sharding", [IID, non_iid(2), dirichlet(0.5)], ids=str)
def test_the_generator_decides(sharding: dict[str, Any]):
    labels = labels_of([40] * 5)
    once, again, other = (shards_of(labels, 10, sharding, seed) for seed in (3, 3, 4))
    assert all(map(torch.equal, once, again))
    assert not all(len(a) == len(b) and torch.equal(a, b) for a, b in zip(once, other, strict=True))


def test_labels_are_not_touched_and_their_names_do_not_matter():
    labels = labels_of([12, 30, 9])
    kept = labels.clone()
    named = shards_of(labels * 1000 - 7, 4, non_iid(2))
    assert all(map(torch.equal, named, shards_of(labels, 4, non_iid(2))))
    assert torch.equal(labels, kept)


@pytest.mark.parametrize(
    ("totals", "num_clients", "sharding", "message"),
    [
        ([5, 5], 11, IID, "num_clients is 11, but there are 10 samples"),
        ([5, 5, 5], 3, non_iid(4), "nc is 4, but the samples have 3 classes; take 1 to 3"),
        ([5, 5, 5], 2, non_iid(1), "2 clients with 1 classes each cannot hold all 3 classes"),
        ([9, 2, 9], 3, non_iid(3), "1 classes have fewer samples than clients that hold them, such as one with 2"),
        ([5, 5], 2, {"sharding": "non_iid"}, "sharding non_iid needs nc"),
        ([5, 5], 2, IID | {"nc": 2}, "nc is of sharding non_iid, not of iid; leave it out"),
        ([5, 5], 2, IID | {"allow_missing_classes": True}, "allow_missing_classes is of sharding non_iid"),
        ([5, 5], 2, {"sharding": "dirichlet"}, "sharding dirichlet needs alpha"),
        ([5, 5], 2, {"sharding": "noniid"}, 'did you mean "non_iid"'),
        ([5, 5], 2, dirichlet(0.0), "alpha: must be greater than 0, not 0.0"),
        ([5, 5], 2, dirichlet(float("nan")), "alpha: must be a finite number"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_an_error(totals, num_clients, sharding, message):
    with pytest.raises(DeltaflError) as caught:
        shards_of(labels_of(totals), num_clients, sharding)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_of_another_form_are_an_error():
    for labels in (torch.zeros(3), torch.zeros(3, 1, dtype=torch.int64)):
        fails(r"sharding takes torch.int64 \(N,\)", shards_of, labels, 1, IID)


def test_counts_what_is_held_left_out_and_given_twice():
    labels = torch.tensor([0, 1, 1, 2, 0, 2])
    told = shard_counts([torch.tensor([0, 1, 2]), torch.tensor([2, 3])], labels, 4)
    assert {name: value.tolist() for name, value in told.items()} == {
        "counts": [[1, 2, 0, 0], [0, 1, 1, 0]], "sizes": [3, 2], "classes": [2, 2],
        "smallest": 2, "largest": 3, "duplicates": 1, "left_out": [1, 0, 1, 0],
    }  # fmt: skip
