"""Task vectors against float64 numpy, and what their operations refuse."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from checkpoint_files import save, toy, tuned
from deltafl import TaskVector, cclip, fedavg, fedgma, fednova, median, task_arithmetic
from deltafl.errors import DeltaflError
from deltafl.models.fit import random_head
from deltafl.models.head import HEAD_FILE, save_head

FLOATS = [n for n, t in toy().items() if t.is_floating_point()]
FLOAT32 = {
    "rtol": 2e-6,
    "atol": 2e-6,
}  # some float32 roundings of a sum of five terms up to 20 or so
Array = np.ndarray


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    return {n: t.double().numpy() for n, t in tensors.items()}


def assert_close(vector: TaskVector, wanted: Mapping[str, Array]) -> None:
    assert set(vector.tensors) == set(wanted)
    for name, values in arrays(vector.tensors).items():
        np.testing.assert_allclose(values, wanted[name], err_msg=name, **FLOAT32)


def vector(seed: int = 0, scale: float = 1.0) -> TaskVector:
    return TaskVector({n: t for n, t in toy(seed, scale).items() if t.is_floating_point()})


def combine(wanted: Callable[..., Array], *vectors: TaskVector) -> dict[str, Array]:
    held = [arrays(v.tensors) for v in vectors]
    return {n: wanted(*(h[n] for h in held)) for n in held[0]}


# From checkpoints


def test_a_task_vector_is_the_difference_of_the_float_tensors() -> None:
    base, model = toy(), tuned(toy(), 1)
    delta = TaskVector.from_checkpoints(base, model)
    assert sorted(delta.tensors) == sorted(FLOATS)
    assert_close(delta, {n: (model[n] - base[n]).double().numpy() for n in FLOATS})


@pytest.mark.parametrize("wide", ["base", "model"])
def test_a_float64_model_loses_nothing(wide: str) -> None:
    held = {"base": toy(), "model": tuned(toy(), 1)}
    held[wide] = {
        n: t.double() + 1e-12 if t.is_floating_point() else t for n, t in held[wide].items()
    }
    delta = TaskVector.from_checkpoints(held["base"], held["model"])
    for name in FLOATS:
        assert torch.equal(
            delta.tensors[name], held["model"][name].double() - held["base"][name].double()
        )


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(5)


def write(tensors: Mapping[str, Tensor], folder: Path, form: str) -> object:
    if form == "mapping":
        return tensors
    if form == "pt":
        torch.save(dict(tensors), folder / "weights.pt")
        return str(folder / "weights.pt")
    save(folder / "model", tensors, shards=2 if form == "sharded" else 1)
    return folder / "model/model.safetensors" if form == "file" else folder / "model"


@pytest.mark.parametrize("form", ["mapping", "folder", "sharded", "file", "pt"])
@pytest.mark.parametrize("which", ["base", "finetuned"])
def test_base_and_model_are_mappings_or_paths_in_any_form(
    tmp_path: Path, form: str, which: str
) -> None:
    given: dict[str, object] = {"base": toy(), "finetuned": tuned(toy(), 1)}
    wanted = {n: (tuned(toy(), 1)[n] - toy()[n]).double().numpy() for n in FLOATS}
    given[which] = write(given[which], tmp_path, form)  # type: ignore[arg-type]
    assert_close(TaskVector.from_checkpoints(**given), wanted)  # type: ignore[arg-type]


def test_base_and_model_are_modules() -> None:
    base, model = Net(0), Net(1)
    delta = TaskVector.from_checkpoints(base, model)
    held = base.state_dict()
    assert set(delta.tensors) == {n for n, t in held.items() if t.is_floating_point()}
    assert_close(
        delta, {n: (model.state_dict()[n] - held[n]).double().numpy() for n in delta.tensors}
    )


def test_training_a_module_further_leaves_its_task_vector_as_it_was() -> None:
    base, model = Net(0), Net(1)
    delta = TaskVector.from_checkpoints(base, model)
    before = {n: t.clone() for n, t in delta.tensors.items()}
    with torch.no_grad():
        model.first.weight.add_(1)
        base.first.bias.add_(1)
    assert all(torch.equal(t, before[n]) for n, t in delta.tensors.items())


def test_a_task_vector_from_files_reads_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltafl.checkpoints.checkpoint import Checkpoint

    reads: list[str] = []
    original = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint,
        "read",
        lambda self, name, *rest: (reads.append(name), original(self, name, *rest)),
    )
    save(tmp_path / "base", toy())
    save(tmp_path / "model", tuned(toy(), 1))
    delta = TaskVector.from_checkpoints(tmp_path / "base", tmp_path / "model")
    assert not reads
    delta.tensors["layer.0.bias"]
    assert reads == ["layer.0.bias"] * 2


def test_bfloat16_models_have_a_float32_difference() -> None:
    base = toy(dtype=torch.bfloat16)
    model = tuned(base, 1)
    delta = TaskVector.from_checkpoints(base, model)
    assert {t.dtype for t in delta.tensors.values()} == {torch.float32}
    assert_close(delta, {n: model[n].double().numpy() - base[n].double().numpy() for n in FLOATS})


def test_a_model_that_does_not_fit_the_base_is_an_error_that_names_every_tensor() -> None:
    model = tuned(toy(), 1)
    model["embed.weight"] = torch.ones(11, 8)
    del model["norm.weight"]
    with pytest.raises(DeltaflError) as error:
        TaskVector.from_checkpoints(toy(), model)
    assert any(
        '"embed.weight" is (11, 8), the base has (9, 8)' in p for p in error.value.problems
    ), error.value
    assert any('"norm.weight"' in p for p in error.value.problems)


def test_a_head_that_only_the_model_has_is_left_out(tmp_path: Path) -> None:
    model = tuned(toy(), 1) | {
        "classifier.weight": torch.ones(3, 8),
        "classifier.bias": torch.ones(3),
    }
    delta = TaskVector.from_checkpoints(toy(), model)
    assert sorted(delta.tensors) == sorted(FLOATS)
    save(tmp_path / "model", tuned(toy(), 1))
    save_head(random_head(16, ("a", "b"), torch.Generator()), tmp_path / "model" / HEAD_FILE)
    assert sorted(TaskVector.from_checkpoints(toy(), tmp_path / "model").tensors) == sorted(FLOATS)


# Algebra


def test_plus_minus_and_negation_are_those_of_a_vector_space() -> None:
    a, b = vector(0), vector(1)
    assert_close(a + b, combine(lambda x, y: x + y, a, b))
    assert_close(a - b, combine(lambda x, y: x - y, a, b))
    assert_close(-a, combine(lambda x: -x, a))


def test_sum_adds_a_list_of_task_vectors() -> None:
    vectors = [vector(i) for i in range(4)]
    assert_close(sum(vectors), combine(lambda *x: sum(x), *vectors))  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [0.3, -2, 0])
def test_a_scalar_multiplies_from_both_sides(factor: float) -> None:
    a = vector()
    wanted = combine(lambda x: factor * x, a)
    assert_close(a * factor, wanted)
    assert_close(factor * a, wanted)


def test_no_operation_changes_its_operands() -> None:
    a, b, base = vector(0), vector(1), toy(2)
    before = copy.deepcopy([a.tensors, b.tensors, base])
    for made in (
        a + b,
        a - b,
        -a,
        a * 2,
        2 * a,
        sum([a, b]),
        task_arithmetic([a, b]),
        median([a, b]),
    ):
        for tensor in made.tensors.values():  # type: ignore[union-attr]
            tensor.fill_(7)
    for tensor in a.apply_to(base).values():
        tensor.fill_(7)
    for held, was in zip([a.tensors, b.tensors, base], before, strict=True):
        assert all(torch.equal(held[n], was[n]) for n in was)


def test_what_is_no_task_vector_cannot_be_added() -> None:
    for other in (1, "x", toy()):
        with pytest.raises(TypeError):
            vector() + other  # type: ignore[operator]
        with pytest.raises(TypeError):
            vector() - other  # type: ignore[operator]
        with pytest.raises(TypeError):
            other + vector()  # type: ignore[operator]


BINARY: dict[str, Callable[[TaskVector, TaskVector], object]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "sum": lambda a, b: sum([a, b]),
    "dot": lambda a, b: a.dot(b),
    "task_arithmetic": lambda a, b: task_arithmetic([a, b]),
    "median": lambda a, b: median([a, b]),
}


@pytest.mark.parametrize("name", BINARY)
def test_task_vectors_with_other_tensors_are_an_error_that_names_them(name: str) -> None:
    odd = TaskVector(
        {n: t for n, t in vector(1).tensors.items() if n != "layer.0.bias"}
        | {"extra": torch.ones(2)}
    )
    for pair in ((vector(), odd), (odd, vector())):
        with pytest.raises(DeltaflError, match=r'differ in tensors: "extra", "layer\.0\.bias"'):
            BINARY[name](*pair)


@pytest.mark.parametrize("name", BINARY)
def test_task_vectors_of_other_shapes_are_an_error_that_names_the_tensor(name: str) -> None:
    odd = TaskVector({**vector(1).tensors, "layer.0.bias": torch.ones(1)})  # (1,) would broadcast
    with pytest.raises(DeltaflError, match=r'"layer.0.bias" is \(\d,\)'):
        BINARY[name](vector(), odd)


def test_the_norm_is_that_of_float64() -> None:
    a = vector(3)
    wanted = math.sqrt(sum(float((x**2).sum()) for x in arrays(a.tensors).values()))
    assert a.norm() == pytest.approx(wanted, rel=1e-12)


def test_the_norm_does_not_overflow_in_half_precision_or_lose_small_parts() -> None:
    assert TaskVector({"w": torch.full((4,), 6e4, dtype=torch.float16)}).norm() == pytest.approx(
        2 * 60000, rel=1e-15
    )
    many = TaskVector(
        {"big": torch.tensor([4096.0]), "small": torch.ones(100)}
    )  # 2^24 + 1 is 2^24 in float32
    assert many.norm() == math.sqrt(4096.0**2 + 100)


def test_the_norm_from_files_is_that_from_memory(tmp_path: Path) -> None:
    save(tmp_path / "base", toy())
    save(tmp_path / "model", tuned(toy(), 1))
    lazy = TaskVector.from_checkpoints(tmp_path / "base", tmp_path / "model")
    memory = TaskVector.from_checkpoints(toy(), tuned(toy(), 1))  # in another order of tensors
    assert lazy.norm() == memory.norm()


def test_a_dot_product_is_that_of_float64() -> None:
    a, b = vector(0), vector(1)
    wanted = sum(
        float((x * y).sum())
        for x, y in zip(arrays(a.tensors).values(), arrays(b.tensors).values(), strict=True)
    )
    assert a.dot(b) == pytest.approx(wanted, rel=1e-12)


def test_a_dot_product_does_not_depend_on_the_order_of_the_tensors() -> None:
    values = {"large": torch.tensor([2.0**27]), **{f"t{i}": torch.tensor([1.0]) for i in range(8)}}
    a, b = TaskVector(values), TaskVector(dict(reversed(values.items())))
    assert (
        a.dot(a) == b.dot(b) == 2.0**54 + 8
    )  # one by one after the large one, every 1 is lost: the spacing is 4


def test_a_task_vector_says_how_large_it_is() -> None:
    a = vector()
    assert (
        repr(a) == f"TaskVector(5 tensors, {sum(t.numel() for t in a.tensors.values()):,} elements)"
    )


# Application


def test_applying_adds_the_scaled_delta_to_a_mapping() -> None:
    base, model = toy(), tuned(toy(), 1)
    applied = TaskVector.from_checkpoints(base, model).apply_to(base, scaling_coef=0.3)
    assert list(applied) == list(base)
    for name in FLOATS:
        wanted = base[name].double() + 0.3 * (model[name].double() - base[name].double())
        torch.testing.assert_close(applied[name].double(), wanted, rtol=2e-7, atol=2e-7)
    assert torch.equal(applied["steps"], base["steps"])


def test_applying_with_coefficient_one_by_default_gives_the_model_back() -> None:
    base, model = toy(), tuned(toy(), 1)
    applied = TaskVector.from_checkpoints(base, model).apply_to(base)
    for name in FLOATS:
        torch.testing.assert_close(applied[name], model[name], rtol=2e-7, atol=2e-7)


def test_applying_to_a_path_gives_what_applying_to_its_tensors_gives(tmp_path: Path) -> None:
    delta = TaskVector.from_checkpoints(toy(), tuned(toy(), 1))
    wanted = delta.apply_to(toy(), 0.4)
    applied = delta.apply_to(save(tmp_path / "base", toy()), 0.4)
    assert isinstance(applied, dict)
    assert all(torch.equal(applied[n], wanted[n]) for n in wanted)


def test_applying_to_a_module_gives_a_new_module_of_the_same_class() -> None:
    base, model = Net(0), Net(1)
    base.norm.num_batches_tracked.fill_(5)
    before = copy.deepcopy(base.state_dict())
    applied = TaskVector.from_checkpoints(base, model).apply_to(base, 0.5)
    assert type(applied) is Net
    assert applied is not base
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    held = applied.state_dict()
    torch.testing.assert_close(
        held["first.weight"], (before["first.weight"] + model.first.weight.detach()) / 2
    )
    assert int(held["norm.num_batches_tracked"]) == 5
    assert not {t.data_ptr() for t in held.values()} & {
        t.data_ptr() for t in base.state_dict().values()
    }


def test_a_task_vector_of_a_part_leaves_the_rest_of_the_base() -> None:
    base = toy()
    applied = TaskVector({"layer.0.bias": torch.ones(8)}).apply_to(base)
    assert torch.equal(applied["layer.0.bias"], base["layer.0.bias"] + 1)
    assert all(torch.equal(applied[n], base[n]) for n in base if n != "layer.0.bias")


def test_applying_to_a_base_that_lacks_a_tensor_is_an_error_that_names_it() -> None:
    with pytest.raises(DeltaflError, match='the base lacks tensors of the update: "other"'):
        TaskVector({"other": torch.ones(2)}).apply_to(toy())


def test_applying_to_a_base_of_another_shape_is_an_error_that_names_the_tensor() -> None:
    with pytest.raises(DeltaflError, match=r'"layer.0.bias".*\(1,\).*\(8,\)'):
        TaskVector({"layer.0.bias": torch.ones(1)}).apply_to(toy())


def test_a_bfloat16_base_is_rounded_once() -> None:
    base = toy(dtype=torch.bfloat16)
    delta = vector(1, scale=0.1)
    applied = delta.apply_to(base, 0.3)
    for name in FLOATS:
        assert torch.equal(
            applied[name], (base[name].float() + 0.3 * delta.tensors[name]).bfloat16()
        )


def test_deltas_too_small_for_bfloat16_one_by_one_count_together() -> None:
    one, small = (
        {"w": torch.ones(1, dtype=torch.bfloat16)},
        TaskVector({"w": torch.tensor([2.0**-9])}),
    )
    assert small.apply_to(one)["w"].item() == 1.0  # the step of bfloat16 above 1 is 2^-7
    assert sum([small] * 4).apply_to(one)["w"].item() == 1.0 + 2.0**-7  # type: ignore[union-attr]


# Files


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    a = vector(1)
    a.save(tmp_path / "delta.safetensors")
    loaded = TaskVector.load(str(tmp_path / "delta.safetensors"))
    assert set(loaded.tensors) == set(a.tensors)
    for name, tensor in a.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype
    assert loaded.norm() == a.norm()  # the file has an order of its own


def test_a_lazy_difference_is_saved_and_loaded(tmp_path: Path) -> None:
    save(tmp_path / "base", toy())
    save(tmp_path / "model", tuned(toy(), 1))
    lazy = TaskVector.from_checkpoints(tmp_path / "base", tmp_path / "model")
    lazy.save(tmp_path / "delta.safetensors")
    loaded = TaskVector.load(tmp_path / "delta.safetensors")
    assert all(torch.equal(loaded.tensors[n], t) for n, t in lazy.tensors.items())


def test_tensors_that_share_memory_or_are_strided_are_saved(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    TaskVector({"a": shared, "b": shared, "c": shared.T}).save(tmp_path / "delta.safetensors")
    loaded = TaskVector.load(tmp_path / "delta.safetensors").tensors
    assert torch.equal(loaded["a"], shared)
    assert torch.equal(loaded["b"], shared)
    assert torch.equal(loaded["c"], shared.T)


def test_loading_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DeltaflError, match=r"none\.safetensors"):
        TaskVector.load(tmp_path / "none.safetensors")


# Rules


def signs_agreeing(rho: float) -> Callable[..., Array]:
    def wanted(*deltas: Array) -> Array:
        agreement = abs(sum(np.sign(d).astype(int) for d in deltas)) / len(deltas)
        return np.where(agreement >= rho - 1e-12, 1.0, agreement) * np.mean(deltas, 0)

    return wanted


def lower_median(*deltas: Array) -> Array:
    return np.sort(deltas, axis=0)[(len(deltas) - 1) // 2]


def weighted(weights: Sequence[float]) -> Callable[..., Array]:
    return lambda *deltas: sum(w * d for w, d in zip(weights, deltas, strict=True))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_every_rule_is_its_formula_at_mean_scale(n: int) -> None:
    vectors = [vector(i, scale=1 + i) for i in range(n)]
    steps, examples = [100 * (i + 1) for i in range(n)], [7 * (i + 2) for i in range(n)]
    norms = [
        math.sqrt(sum(float((x**2).sum()) for x in arrays(v.tensors).values())) for v in vectors
    ]
    rho = sum(norms) / n
    cases = {
        "task_arithmetic": (task_arithmetic(vectors), weighted([1 / n] * n)),
        "fedavg": (fedavg(vectors, examples), weighted([e / sum(examples) for e in examples])),
        "fednova": (fednova(vectors, steps), weighted([sum(steps) / n / (n * s) for s in steps])),
        "fedgma 0.6": (fedgma(vectors, 0.6), signs_agreeing(0.6)),
        "fedgma 1": (fedgma(vectors, 1.0), signs_agreeing(1.0)),
        "median": (median(vectors), lambda *d: np.median(d, axis=0)),
        "median, lower": (median(vectors, middle="lower"), lower_median),
        "cclip": (cclip(vectors, rho), weighted([min(1.0, rho / norm) / n for norm in norms])),
    }
    for name, (made, wanted) in cases.items():
        assert isinstance(made, TaskVector), name
        assert_close(made, combine(wanted, *vectors))


def test_fednova_without_a_number_of_steps_for_each_is_an_error() -> None:
    with pytest.raises(DeltaflError, match="3 numbers for 2 task vectors"):
        fednova([vector(0), vector(1)], [1, 2, 3])
    with pytest.raises(DeltaflError, match="1 numbers for 2 task vectors"):
        fedavg([vector(0), vector(1)], [1])


def test_no_task_vector_at_all_is_an_error() -> None:
    for merged in (task_arithmetic, median):
        with pytest.raises(DeltaflError, match="no models"):
            merged([])


# Operations of arXiv 2212.04089


def test_negation_takes_the_delta_away_from_the_base() -> None:
    base, model = toy(), tuned(toy(), 1)
    forgot = (-TaskVector.from_checkpoints(base, model)).apply_to(base, 0.7)
    for name in FLOATS:
        wanted = base[name].double() - 0.7 * (model[name].double() - base[name].double())
        torch.testing.assert_close(forgot[name].double(), wanted, rtol=2e-7, atol=2e-7)


def test_addition_of_scaled_sums_is_the_merge_of_the_paper() -> None:
    base = toy()
    models = [tuned(base, i) for i in range(3)]
    vectors = [TaskVector.from_checkpoints(base, m) for m in models]
    by_sum = sum(vectors).apply_to(base, 0.3)  # type: ignore[union-attr]
    by_mean = task_arithmetic(vectors).apply_to(base, 0.9)
    for name in FLOATS:
        wanted = base[name].double() + 0.3 * sum(
            m[name].double() - base[name].double() for m in models
        )
        torch.testing.assert_close(by_sum[name].double(), wanted, rtol=3e-7, atol=3e-7)
        torch.testing.assert_close(by_mean[name].double(), wanted, rtol=3e-7, atol=3e-7)


def test_an_analogy_is_c_plus_b_minus_a() -> None:
    base = toy()
    models = [tuned(base, i) for i in range(3)]
    a, b, c = (TaskVector.from_checkpoints(base, m) for m in models)
    made = (c + (b - a)).apply_to(base)
    for name in FLOATS:
        wanted = models[2][name].double() + models[1][name].double() - models[0][name].double()
        torch.testing.assert_close(made[name].double(), wanted, rtol=3e-7, atol=3e-7)
