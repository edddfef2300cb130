"""A `Net`: one vector, the names of files, saving, and what of it trains; for images and language."""

import pytest
import torch
from safetensors.torch import load_file

from deltafl.errors import DeltaflError
from deltafl.models.bridge import net_of
from deltafl.models.causal import load_causal
from deltafl.models.head_recipe import HeadRecipe
from deltafl.tasks import load_task
from deltafl.tasks.arrays import image_task
from deltafl.training.step import scores, train_step
from tiny_models import tiny_llama, tiny_task, tiny_vit, write_lines


def classifier(train_head: bool = False):
    net, task = net_of(tiny_vit()), image_task(tiny_task())
    net.prepare(task, HeadRecipe(head="linear", train_head=train_head))
    return net, task


@pytest.fixture
def language(tmp_path):
    net = tiny_llama(tmp_path / "config")
    return net, load_task(str(write_lines(tmp_path / "text")), net.inputs)


@pytest.mark.parametrize("train_head", [False, True])
def test_one_vector_holds_what_trains(train_head):
    net, task = classifier(train_head)
    assert sum(t.numel() for t in net.trained.values()) == len(net.flat)
    assert ("head.weight" in net.trained) is train_head
    before = {n: t.clone() for n, t in net.trained.items()}
    optimiser = torch.optim.SGD([net.flat], 0.1)
    train_step(net, task, task.batch("train", torch.arange(9)), optimiser, lr=0.1)
    moved = {n for n, t in net.trained.items() if not torch.equal(t, before[n])}
    assert len(moved) > len(before) / 2
    for name, part in net.slices.items():
        assert torch.equal(net.flat.data[part], net.trained[name].reshape(-1))


def test_a_step_is_that_of_torch_on_the_module_itself():
    net, task = classifier(train_head=True)
    twin, _ = classifier(train_head=True)
    batch = task.batch("train", torch.arange(20))
    train_step(net, task, batch, torch.optim.SGD([net.flat], 0.1, momentum=0.9), lr=0.1)
    optimiser = torch.optim.SGD([p for p in twin.module.parameters() if p.requires_grad], 0.1)
    logits = twin.module(batch["images"])
    torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
    optimiser.step()
    for name, parameter in twin.module.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(net.trained[name], parameter.data)


def test_smoothing_is_that_of_torch():
    net, task = classifier()
    from dataclasses import replace

    smooth = replace(task, label_smoothing=0.2)
    batch = smooth.batch("train", torch.arange(9), generator=torch.Generator())
    losses, weights = smooth.loss(net, batch)
    expected = torch.nn.functional.cross_entropy(
        net(batch["images"]), batch["labels"], label_smoothing=0.2, reduction="none"
    )
    torch.testing.assert_close(losses, expected)
    assert torch.equal(weights, torch.ones(9))


def test_a_saved_classifier_loads_by_the_names_of_its_file(tmp_path):
    net, _ = classifier()
    net.save(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("encoder.layers") for name in held)
    other, _ = classifier()
    with torch.no_grad():
        other.flat.zero_()
    other.load(held)
    assert torch.equal(other.flat, net.flat)


def test_loading_refuses_what_does_not_fit_and_changes_nothing():
    net, _ = classifier()
    before = net.flat.detach().clone()
    given = {n: t.clone() + 1 for n, t in net.trained.items()}
    name = next(iter(given))
    with pytest.raises(DeltaflError, match="the model needs"):
        net.load({n: t for n, t in given.items() if n != name})
    with pytest.raises(DeltaflError, match="the model has"):
        net.load(given | {name: torch.zeros(1)})
    assert torch.equal(net.flat, before)


def test_a_language_model_is_scored_by_its_likelihood_and_saved(language, tmp_path):
    net, task = language
    batch = task.batch("test", torch.arange(task.size("test")))
    sums, weights = task.loss(net, batch)
    for i in range(task.size("test")):
        ids = task.splits["test"].ids[i]
        logits = net(input_ids=ids[None]).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
        torch.testing.assert_close(sums[i], expected, rtol=1e-4, atol=1e-4)
        assert weights[i] == len(ids) - 1
    assert (scores(net, task, "test") < 0).all()
    (tmp_path / "saved").mkdir()
    net.save(tmp_path / "saved")
    from transformers import AutoConfig

    again = load_causal(str(tmp_path / "saved"), AutoConfig.from_pretrained(tmp_path / "saved"))
    assert torch.equal(again.flat, net.flat)


def test_lines_have_the_file_as_their_source(language):
    _, task = language
    assert task.groups("train").unique().tolist() == [0, 1]
    assert not task.ratio_scaled
