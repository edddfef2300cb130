import logging
from itertools import pairwise

import pytest
import torch

from deltafl.errors import DeltaflError
from deltafl.models.flat import FlatModel
from deltafl.sparse.calibration import attenuated, calibrate
from deltafl.sparse.eligible import Eligible, eligible
from deltafl.sparse.masks import make_mask
from tiny_models import tiny_vit

SHAPES = {"a": (50,), "b": (6, 10)}
PART = torch.arange(60).reshape(6, 10) % 3 != 0
ABLE = Eligible(SHAPES, {"b": PART}, {"b": "for the test"}, frozenset())
WEIGHTS = {n: torch.randn(s, generator=torch.Generator().manual_seed(9)) for n, s in SHAPES.items()}


def scores_of(r: int):
    draw = torch.Generator().manual_seed(r)
    return {n: torch.rand(s, generator=draw) for n, s in SHAPES.items()}


def run(kind, rounds, score, strategy="least_sensitive", sparsity=0.8, scope="global", **options):
    options = {"eligible": ABLE, "weights": WEIGHTS, **options}
    return calibrate(
        kind,
        rounds,
        score,
        strategy=strategy,
        sparsity=sparsity,
        scope=scope,
        generator=torch.Generator().manual_seed(0),
        **options,
    )


def plain(scores, sparsity=0.8, strategy="least_sensitive", scope="global"):
    return make_mask(
        strategy,
        sparsity=sparsity,
        scope=scope,
        eligible=ABLE,
        scores=scores,
        weights=WEIGHTS,
        generator=torch.Generator().manual_seed(0),
    )


def same(one, two) -> bool:
    return all(torch.equal(one[n], two[n]) for n in SHAPES)


class Recorder:
    def __init__(self, score=scores_of) -> None:
        self.calls, self.score = [], score

    def __call__(self, r, survivors):
        self.calls.append(
            (r, None if survivors is None else {n: m.clone() for n, m in survivors.items()})
        )
        return self.score(r)


@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_average_is_one_threshold_on_the_mean(scope):
    score = Recorder()
    mask = run("average", 4, score, scope=scope)
    mean = {n: sum(scores_of(r)[n].double() for r in range(4)) / 4 for n in SHAPES}
    assert same(mask, plain(mean, scope=scope))
    assert not same(mask, plain(scores_of(0), scope=scope))
    assert score.calls == [(r, None) for r in range(4)]


def test_one_round_of_each_kind_is_the_plain_mask():
    assert same(run("average", 1, Recorder()), plain(scores_of(0)))
    assert same(run("progressive", 1, Recorder()), plain(scores_of(0)))


@pytest.mark.parametrize("scope", ["global", "per_layer"])
@pytest.mark.parametrize("strategy", ["least_sensitive", "most_sensitive"])
def test_progressive_masks_are_nested_and_shrink_on_schedule(strategy, scope):
    rounds, keep = 5, 1 - 0.8
    score = Recorder()
    final = run("progressive", rounds, score, strategy, scope=scope)
    assert [r for r, _ in score.calls] == list(range(rounds))
    assert score.calls[0][1] is None
    masks = [survivors for _, survivors in score.calls[1:]] + [final]
    for r, mask in enumerate(masks, 1):
        if scope == "global":
            assert sum(int(m.sum()) for m in mask.values()) == round(
                keep ** (r / rounds) * ABLE.total
            )
        else:
            for n in SHAPES:
                assert int(mask[n].sum()) == round(keep ** (r / rounds) * ABLE.numel(n))
        assert not (mask["b"] & ~PART).any()
    for larger, smaller in pairwise(masks):
        assert all((smaller[n] <= larger[n]).all() for n in SHAPES)


def test_what_was_dropped_never_returns():
    """Later rounds score 0 (pruned weights look insensitive) wherever the first round dropped."""
    dropped = {}

    def score(r, survivors):
        if survivors is None:
            return scores_of(0)
        dropped.update({n: ~survivors[n] for n in SHAPES})
        return {n: torch.where(survivors[n], scores_of(r)[n] + 1, 0) for n in SHAPES}

    mask = run("progressive", 3, score)
    assert sum(int(m.sum()) for m in mask.values()) == round(0.2 * ABLE.total)
    assert not any((mask[n] & dropped[n]).any() for n in SHAPES)


def test_scores_of_dropped_coordinates_are_not_read():
    def score(r, survivors):
        if survivors is None:
            return scores_of(0)
        return {n: torch.where(survivors[n], scores_of(r)[n], torch.nan) for n in SHAPES}

    assert sum(int(m.sum()) for m in run("progressive", 3, score).values()) == round(
        0.2 * ABLE.total
    )


@pytest.mark.parametrize("kind", ["average", "progressive"])
@pytest.mark.parametrize("strategy", ["lowest_magnitude", "highest_magnitude", "random"])
def test_strategies_without_scores_never_score(kind, strategy):
    def score(r, survivors):
        raise AssertionError("scored")

    assert same(run(kind, 4, score, strategy), plain(None, strategy=strategy))


def test_rounds_on_the_same_data_are_logged(caplog):
    with caplog.at_level(logging.WARNING):
        run("average", 3, Recorder())
        assert not caplog.records
        run("average", 2, Recorder(lambda r: scores_of(0)))
    assert "calibration round 1 gave the scores of round 0" in caplog.text


def test_the_callbacks_scores_are_not_modified():
    given = [scores_of(r) for r in range(3)]
    run("average", 3, lambda r, survivors: given[r])
    run("progressive", 3, lambda r, survivors: given[r])
    assert all(same(given[r], scores_of(r)) for r in range(3))


def test_attenuation_lowers_dropped_weights_only_while_scoring():
    model = FlatModel(tiny_vit())
    able = eligible(model)
    before = model.flat.detach().clone()
    tensors = {n: t.clone() for n, t in model.tensors().items()}
    seen = []

    def score(r, survivors):
        assert torch.is_grad_enabled()
        now = model.tensors()
        if survivors is None:
            assert torch.equal(model.flat, before)
        else:
            for n, t in now.items():
                part = able.of(n)
                dropped = ~survivors[n] & (torch.ones_like(survivors[n]) if part is None else part)
                assert torch.equal(t, torch.where(dropped, tensors[n] * 0.25, tensors[n]))
            assert not torch.equal(model.flat, before)
        seen.append(r)
        draw = torch.Generator().manual_seed(r)
        return {n: torch.rand(t.shape, generator=draw) for n, t in now.items()}

    run(
        "progressive", 3, score, eligible=able, weights=model.tensors(), attenuate=0.25, model=model
    )
    assert seen == [0, 1, 2]
    assert torch.equal(model.flat, before)


def test_attenuation_is_undone_bit_for_bit_after_an_error():
    model = FlatModel(tiny_vit())
    able = eligible(model)
    before = model.flat.detach().clone()
    survivors = {n: torch.zeros(s, dtype=torch.bool) for n, s in able.shapes.items()}

    def fail():
        with attenuated(model, survivors, able, 0.1):
            assert not torch.equal(model.flat, before)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert torch.equal(model.flat.detach().view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "averge"}, 'did you mean "average"'),
        ({"rounds": 0}, "0 calibration rounds"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"attenuate": 0.5}, "give that model"),
        ({"attenuate": 2.0}, "from 0 to 1"),
        ({"attenuate": 0.5, "kind": "average"}, "leave it out"),
        ({"attenuate": 0.5, "strategy": "random"}, "leave it out"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(DeltaflError, match=message):
        run(**{"kind": "progressive", "rounds": 2, "score": Recorder(), **change})
