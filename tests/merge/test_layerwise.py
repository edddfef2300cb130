"""Merging by examples, against the same layer by layer: every input computed anew, in float64."""

import copy
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError
from deltafl.merge.layerwise import Examples, Start, maps_of, merge_layerwise
from deltafl.models import Net
from deltafl.progress import Progress
from deltafl.rules.regmean import RegMean
from deltafl.rules.regmean_plus import RegMeanPlus
from deltafl.rules.rule import LayerRule
from deltafl.rules.sequential_regression import SequentialRegression
from deltafl.tasks import ImageInput, ImageTask, TextInput, TextTask
from deltafl.tasks.lines import tokenised
from deltafl.tasks.text import Texts
from tiny_models import tiny_images, tiny_llama

RULES = {
    SequentialRegression: ("tuned", "merged"),
    RegMean: ("tuned", "tuned"),
    RegMeanPlus: ("merged", "merged"),
}
"""Rule -> the models whose inputs its paper multiplies."""


class Mixed(nn.Module):
    """A strided and a depthwise convolution, a norm, maps with and without bias, a tied one; two
    maps are added to what was before them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.BatchNorm2d(6)
        self.plain = nn.Linear(6, 5, bias=False)
        self.block = nn.Linear(5, 5)
        self.twice = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.conv.bias.dtype) / 255
        x = self.conv(x).relu()
        x = self.norm(x + self.depthwise(x)).relu().mean((2, 3))
        x = self.plain(x)
        x = self.block(x.tanh()) + x
        return self.last(self.twice(self.twice(x).tanh()))


MAPS = ("conv", "depthwise", "plain", "block", "last")


def models(count: int = 3) -> list[Mixed]:
    """A base and fine-tunes of it, in float64."""
    torch.manual_seed(0)
    base = Mixed().double().eval()
    made = [base]
    for seed in range(count):
        torch.manual_seed(seed + 1)
        tuned = Mixed().double().eval()
        mixed = {
            n: t + 0.2 * tuned.state_dict()[n] if t.is_floating_point() else t
            for n, t in base.state_dict().items()
        }
        tuned.load_state_dict(mixed)
        made.append(tuned)
    return made


def tasks(count: int = 3) -> list[ImageTask]:
    return [tiny_images(train=20 + i) for i in range(count)]


def floats(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in module.state_dict().items() if t.is_floating_point()}


def world(made: Sequence[Mixed], weights: Sequence[float]) -> tuple[Start, list[Examples]]:
    base, *tuned = made
    net = Net(base, ImageInput(8, 1))
    deltas = [{n: t - floats(base)[n] for n, t in floats(m).items()} for m in tuned]
    mean = {n: sum(w * d[n] for w, d in zip(weights, deltas, strict=True)) for n in deltas[0]}
    start = Start(floats(base), mean, torch.float64)
    examples = [
        Examples(net, task, floats(m), w)
        for i, (m, task, w) in enumerate(zip(tuned, tasks(len(tuned)), weights, strict=True))
    ]
    return start, examples


def inputs_of(module: nn.Module, at: str, images: Tensor) -> np.ndarray:
    """(rows, in) of a map, or (channels, rows, 9) of the depthwise one, a 1 at the end of each."""
    seen: list[Tensor] = []
    layer = module.get_submodule(at)
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    module(images)
    hook.remove()
    x = seen[0]
    if isinstance(layer, nn.Conv2d):
        stride, (h, w) = layer.stride[0], x.shape[2:]
        padded = nn.functional.pad(x, [1] * 4)
        patches = [
            padded[:, :, i : i + 3, j : j + 3].flatten(2)
            for i in range(0, h, stride)
            for j in range(0, w, stride)
        ]
        rows = torch.stack(patches, 1)  # (B, places, C, 9)
        rows = rows.permute(2, 0, 1, 3).flatten(1, 2)
        x = rows if layer.groups > 1 else rows.permute(1, 0, 2).flatten(1)
    x = x.numpy()
    ones = np.ones((*x.shape[:-1], 1))
    return np.concatenate([x, ones], -1) if layer.bias is not None else x


def skip_of(module: nn.Module, at: str, images: Tensor) -> np.ndarray:
    """What the result of a map is added to: (rows, out), or (channels, rows, 1); zeros: nothing."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.conv.register_forward_hook(lambda _, args, made: seen.update(conv=made.relu())),
        module.plain.register_forward_hook(lambda _, args, made: seen.update(plain=made)),
    ]
    module(images)
    for hook in hooks:
        hook.remove()
    if at == "depthwise":
        return seen["conv"].detach().permute(1, 0, 2, 3).reshape(6, -1, 1).numpy()
    return seen["plain"].detach().numpy() if at == "block" else np.zeros(())


def reference(
    made: Sequence[Mixed], weights: Sequence[float], rule: LayerRule, ids: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The formula of `LayerRule`; the merged model runs from the start for every map."""
    base, *tuned = made
    merged = Mixed().double().eval()
    state = {
        n: sum(w * floats(m)[n] for w, m in zip(weights, tuned, strict=True)) for n in floats(base)
    }
    merged.load_state_dict(state | {"norm.num_batches_tracked": torch.tensor(0)})
    for at in MAPS:
        cross = gram = prior = 0.0
        for model, task, own, w in zip(tuned, tasks(len(tuned)), ids, weights, strict=True):
            images = task.batch("train", own)["images"]
            sides = {"tuned": model, "merged": merged}
            left, right = (inputs_of(sides[side], at, images) for side in RULES[type(rule)])
            layer = model.get_submodule(at)
            matrix = layer.weight.detach().flatten(1).numpy()
            if layer.bias is not None:
                matrix = np.concatenate([matrix, layer.bias.detach().numpy()[:, None]], 1)
            if at == "depthwise":
                matrix = matrix[:, None]
            ours, theirs = (skip_of(sides[side], at, images) for side in RULES[type(rule)])
            wanted = left @ np.swapaxes(matrix, -1, -2) + ours - theirs
            n = left.shape[-2]
            cross = cross + w * np.swapaxes(wanted, -1, -2) @ right / n
            gram = gram + w * np.swapaxes(right, -1, -2) @ right / n
            prior = prior + w * matrix
        scale = np.trace(gram, axis1=-2, axis2=-1) / gram.shape[-1]
        lam = (rule.ridge * scale)[..., None, None] * np.eye(gram.shape[-1])
        solved = np.swapaxes(
            np.linalg.solve(gram + lam, np.swapaxes(cross + prior @ lam, -1, -2)), -1, -2
        )
        layer = merged.get_submodule(at)
        with torch.no_grad():
            matrix = torch.from_numpy(solved)
            if layer.bias is not None:
                layer.bias.copy_(matrix[..., -1].reshape(-1))
                matrix = matrix[..., :-1]
            layer.weight.copy_(matrix.reshape(layer.weight.shape))
    return floats(merged)


@pytest.mark.parametrize("weights", [(1 / 3,) * 3, (0.5, 0.3, 0.2)], ids=["equal", "weighted"])
@pytest.mark.parametrize("kind", RULES)
def test_every_map_is_that_of_the_formula(kind: type[LayerRule], weights) -> None:
    rule, made = kind(examples=12, ridge=0.003), models()
    start, examples = world(made, weights)
    found, report = merge_layerwise(rule, start, examples)
    expected = reference(made, weights, rule, [e.drawn(12, 0) for e in examples])
    assert set(found) == {
        f"{at}.{n}" for at in MAPS for n in ("weight", "bias") if (at, n) != ("plain", "bias")
    }
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-8, atol=1e-10)
    assert report["averaged"] == ["twice.weight", "idle.weight"]


@pytest.mark.parametrize("kind", RULES)
def test_equal_fine_tunes_are_found_again(kind: type[LayerRule]) -> None:
    base, tuned = models(1)
    start, examples = world([base, tuned, tuned], (0.5, 0.5))
    found, _ = merge_layerwise(kind(examples=20, ridge=1e-9), start, examples)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, floats(tuned)[name], rtol=1e-4, atol=1e-5)


def test_a_map_without_a_signal_is_the_mean(tmp_path: Path) -> None:
    made = models()
    for model in made:
        nn.init.zeros_(model.conv.weight)
        nn.init.constant_(model.conv.bias, -1.0)  # relu: the depthwise convolution sees zeros
    start, examples = world(made, (1 / 3,) * 3)
    found, _ = merge_layerwise(SequentialRegression(examples=8), start, examples)
    mean = sum(floats(m)["depthwise.weight"] for m in made[1:]) / 3
    torch.testing.assert_close(found["depthwise.weight"], mean)


def test_maps_are_found_in_the_order_in_which_they_run() -> None:
    start, examples = world(models(), (1 / 3,) * 3)
    maps = maps_of(start, examples[0])
    assert [m.weight for m in maps] == [f"{at}.weight" for at in MAPS]
    assert [m.groups for m in maps] == [1, 6, 1, 1, 1]
    assert [bool(m.skip) for m in maps] == [False, True, False, True, False]


def test_more_examples_than_there_are_is_one_line() -> None:
    start, examples = world(models(), (1 / 3,) * 3)
    with pytest.raises(DeltaflError, match="20 train examples, fewer than 21"):
        merge_layerwise(SequentialRegression(examples=21), start, examples)


def test_bytes_are_those_of_moments_and_maps() -> None:
    start, examples = world(models(), (1 / 3,) * 3)
    _, report = merge_layerwise(RegMean(examples=4), start, examples)
    shapes = [(1, 6, 10), (6, 1, 10), (1, 5, 6), (1, 5, 6), (1, 3, 6)]
    assert report["bytes_up"] == 8 * sum(g * (2 * o * i + i * i) for g, o, i in shapes)
    assert report["bytes_down"] == 8 * sum(g * o * i for g, o, i in shapes)


def test_a_merge_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    rule, threads = SequentialRegression(examples=12), threading.active_count()
    whole, _ = merge_layerwise(rule, *world(models(), (1 / 3,) * 3))

    def stop(progress: Progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_layerwise(rule, *world(models(), (1 / 3,) * 3), stop, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    again, _ = merge_layerwise(rule, *world(models(), (1 / 3,) * 3), state=tmp_path)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert threading.active_count() == threads


def test_rows_of_language_models_are_tokens_and_no_padding(tmp_path: Path) -> None:
    """RegMean of each projection, against moments of lines that run alone, in float64."""
    net = tiny_llama(tmp_path)
    inputs = net.inputs
    assert isinstance(inputs, TextInput)
    ids = tokenised(["ab", "a longer line", "four", "the fifth one is it"], inputs)
    lines = Texts(ids, torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    task = TextTask("lines", {"train": lines, "val": lines, "test": lines})
    base = {n: t.double() for n, t in net.module.state_dict().items()}
    tuned = [{n: t * (1.1 + i / 10) for n, t in base.items()} for i in range(2)]
    mean = {n: (tuned[0][n] + tuned[1][n]) / 2 - t for n, t in base.items()}
    start = Start(base, mean, torch.float64)
    examples = [Examples(net, task, t, 0.5) for i, t in enumerate(tuned)]
    found, report = merge_layerwise(RegMean(examples=4, ridge=0.01), start, examples)
    assert report["averaged"] == ["model.embed_tokens.weight"]
    assert len(found) == 2 * 7 + 1
    for name, tensor in found.items():
        cross = gram = 0.0
        for state in tuned:
            module = copy.deepcopy(net.module).double()
            module.load_state_dict(state)
            rows: list[Tensor] = []
            hook = module.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                lambda _, args, rows=rows: rows.append(args[0][0].detach())
            )
            for line in ids:
                module(input_ids=line[None])
            hook.remove()
            x = torch.cat(rows)
            gram_t = x.T @ x / len(x)
            cross, gram = cross + state[name] @ gram_t, gram + gram_t
        lam = 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        prior = (tuned[0][name] + tuned[1][name]) / 2
        wanted = torch.linalg.solve(gram / 2 + lam / 2, cross / 2 + prior @ lam / 2, left=False)
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-8)


def test_skip_connections_are_found_again_where_padding_makes_a_mask(tmp_path: Path) -> None:
    """By two lines of one length, without a mask, which others have: the same as from any two."""
    net = tiny_llama(tmp_path)
    inputs = net.inputs
    assert isinstance(inputs, TextInput)
    ids = tokenised(["as long", "as this", "but not the third line", "four"], inputs)
    base = {n: t.double() for n, t in net.module.state_dict().items()}
    tuned = [{n: t * (1.1 + i / 10) for n, t in base.items()} for i in range(2)]
    mean = {n: (tuned[0][n] + tuned[1][n]) / 2 - t for n, t in base.items()}
    start, found = Start(base, mean, torch.float64), []
    for order in ([0, 1, 2, 3], [2, 0, 1, 3]):
        lines = Texts([ids[i] for i in order], torch.ones(4, dtype=torch.int64), torch.zeros(4))
        task = TextTask("lines", {"train": lines, "val": lines, "test": lines})
        examples = [Examples(net, task, t, 0.5) for t in tuned]
        assert all(m.skip for m in maps_of(start, examples[0]) if "o_proj" in m.weight)
        found.append(merge_layerwise(SequentialRegression(examples=4), start, examples)[0])
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-9, atol=1e-12)


class Sums(nn.Module):
    """Additions that are no skip connections: of a number, a broadcast row, a share of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = (x.to(self.maps[0].bias.dtype) / 255).flatten(1)
        x = self.maps[0](x) + x.dim()
        row = x.mean(0, keepdim=True)
        x = self.maps[1](x) + row
        x = torch.add(self.maps[2](x), x, alpha=0.5)
        last = self.maps[3]
        return nn.functional.linear(x, weight=last.weight, bias=last.bias) + x


def test_only_a_tensor_of_the_same_shape_is_a_skip_connection() -> None:
    torch.manual_seed(0)
    made = [Sums().double().eval() for _ in range(3)]
    start, examples = world(made, (0.5, 0.5))
    assert [m.skip for m in maps_of(start, examples[0])] == [None] * 4
    found, report = merge_layerwise(SequentialRegression(examples=12), start, examples)
    assert len(found) == 8
    assert not report["averaged"]


class SharedBias(nn.Module):
    """A bias that is added once more where no map is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first((x.to(self.first.bias.dtype) / 255).flatten(1)) * self.first.bias
        return self.second(x)


def test_a_map_whose_bias_is_used_elsewhere_is_none() -> None:
    torch.manual_seed(0)
    made = [SharedBias().double().eval() for _ in range(3)]
    start, examples = world(made, (0.5, 0.5))
    assert [m.weight for m in maps_of(start, examples[0])] == ["second.weight"]
    found, report = merge_layerwise(SequentialRegression(examples=12), start, examples)
    assert found.keys() == {"second.weight", "second.bias"}
    assert report["averaged"] == ["first.weight"]
