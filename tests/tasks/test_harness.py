"""A task of lm-eval judges our model as lm-eval judges it."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from checkpoint_files import refusal, succeed
from deltafl.errors import DeltaflError
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.merge.search_run import run_search
from deltafl.models import Net
from deltafl.tasks import DataRecipe, ImageInput, load_task
from deltafl.training import evaluate
from tiny_models import tiny_llama, tiny_net

COLOURS = ("red", "green", "blue", "grey")


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Net:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def harness():
    if find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed (the extra harness)")


def write_task(folder: Path, kind: str, splits=("val", "test"), **changes: object) -> str:
    """A task of `kind`, its rows beside it."""
    files = {}
    for split, count in zip(splits, (7, 12), strict=False):
        rows = [{"ask": f"n{i}?", "right": i % 4, "text": COLOURS[i % 4]} for i in range(count)]
        files[split] = str(folder / f"{split}.json")
        (folder / f"{split}.json").write_text("\n".join(map(json.dumps, rows)))
    score = "acc" if kind == "multiple_choice" else "exact_match"
    settings = {
        "task": f"colours_{kind}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "output_type": kind,
        "doc_to_text": "{{ask}}",
        "metric_list": [{"metric": score, "aggregation": "mean", "higher_is_better": True}],
        **{{"val": "validation_split", "test": "test_split"}[split]: split for split in splits},
    }
    if kind == "multiple_choice":
        settings |= {"doc_to_choice": [*COLOURS], "doc_to_target": "right"}
    else:
        settings |= {"doc_to_target": "text", "generation_kwargs": {"until": ["."]}}
        settings["generation_kwargs"] |= {"max_gen_toks": 8, "do_sample": False}
    settings |= changes
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def theirs(file: str, net: Net) -> tuple[dict, list[dict]]:
    """lm-eval's own results and rows."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=net.copy_to("cpu").module, tokenizer=net.inputs.tokenizer)
    manager = TaskManager(include_path=str(Path(file).parent), include_defaults=False)
    name = yaml.safe_load(Path(file).read_text())["task"]
    found = simple_evaluate(lm, tasks=[name], task_manager=manager, log_samples=True)
    return found["results"][name], found["samples"][name]


ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
# An untrained model writes no colour: that it writes no letter up to m is true of some answers only.
UP_TO_M = {"metric": "exact_match", "aggregation": "mean", "regexes_to_ignore": ["[^a-m]"]}
CASES = {
    "multiple choice": ("multiple_choice", {}),
    "drawn shots": ("multiple_choice", {"num_fewshot": 2, "fewshot_split": "val"}),
    "smaller is better": ("multiple_choice", {"metric_list": [ACC | {"higher_is_better": False}]}),
    "writing": (
        "generate_until",
        {"metric_list": [UP_TO_M | {"higher_is_better": True}], "doc_to_target": ""},
    ),
    "likelihood": ("loglikelihood", {"metric_list": [ACC]}),
}


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("case", CASES)
def test_our_number_is_that_of_lm_eval(case, net, tmp_path):
    kind, changes = CASES[case]
    file = write_task(tmp_path, kind, **changes)
    task = load_task(f"harness:{file}", net.inputs)
    assert [task.size(s) for s in ("train", "val", "test")] == [0, 7, 12]
    results, samples = theirs(file, net)
    sign = -1 if case == "smaller is better" else 1
    for size in (12, 5):
        found = evaluate(net, task, batch_size=size, device="cpu")
        assert found.score == pytest.approx(sign * results[f"{task.metric},none"])
        assert found.scores.tolist() == [sign * row[task.metric] for row in samples]
    assert len(found.scores.unique()) == (1 if case == "likelihood" else 2), "scores of all kinds"
    assert task.ratio_scaled == (sign > 0)
    (drawn,) = {len(own[0].arguments[0]) > 20 for own in task.requests}
    assert drawn == (case == "drawn shots")


@pytest.mark.usefixtures("harness")
def test_a_task_with_one_split_is_divided_by_the_seed(net, tmp_path, caplog):
    file = write_task(tmp_path, "multiple_choice", splits=("test",))
    data = DataRecipe.of(data=f"harness:{file}", val_fraction=0.3)
    task = load_task(data, net.inputs, 1)
    assert "one split: 2 of its examples, drawn by the seed, are val, 5 test" in caplog.text
    assert sorted([*task.rows["val"], *task.rows["test"]]) == [*range(7)]
    again, other = load_task(data, net.inputs, 1), load_task(data, net.inputs, 2)
    assert task.fingerprint() == again.fingerprint() != other.fingerprint()
    small = load_task(data.replace(limit=1), net.inputs, 1)
    assert [small.size(s) for s in ("train", "val", "test")] == [0, 1, 1]
    assert small.rows["val"].item() in task.rows["val"].tolist()


@pytest.mark.usefixtures("harness")
def test_the_model_and_its_tokenizer_are_as_before(net, tmp_path):
    before = {name: tensor.clone() for name, tensor in net.module.state_dict().items()}
    tokenizer, config = repr(net.inputs.tokenizer), net.module.config.to_dict()
    file = write_task(tmp_path, "generate_until")
    evaluate(net, load_task(f"harness:{file}", net.inputs), device="cpu")
    assert all(torch.equal(before[n], tensor) for n, tensor in net.module.state_dict().items())
    assert (tokenizer, config) == (repr(net.inputs.tokenizer), net.module.config.to_dict())


@pytest.mark.usefixtures("harness")
def test_models_are_searched_by_it_and_not_trained_on_it(tmp_path):
    for seed, name in enumerate(("base", "one", "two")):
        tiny_llama(tmp_path / name, seed).save(tmp_path / name)
    (tmp_path / "more").mkdir()
    files = [
        write_task(tmp_path, "multiple_choice"),
        write_task(tmp_path / "more", "multiple_choice", task="more", doc_to_text="{{text}}"),
    ]
    models = [
        {"path": str(tmp_path / name), "data": f"harness:{file}"}
        for name, file in zip(("one", "two"), files, strict=True)
    ]
    grid = {"methods": ["task_arithmetic"], "scaling_coefs": [0.5, 1.0], "metric": "absolute"}
    recipe = SearchRecipe.of(base=str(tmp_path / "base"), models=models, threads=1, **grid)
    result = run_search(recipe, None)
    assert (result["metric"], len(result["candidates"])) == ("acc", 3)
    for row in result["candidates"]:
        assert row["value"] == pytest.approx(sum(row["val"].values()) / 2)
    data = f"harness:{files[0]}"
    tuning = ("--model", tmp_path / "base", "--data", data, "--steps", 1, "--out", tmp_path / "no")
    assert "0 train" in refusal(tmp_path, "finetune", *tuning)
    said = succeed("evaluate", "--models", tmp_path / "one", "--data", data).out
    assert "test acc" in said


MISTAKES = {
    "no-such-task": "no single task of that name",
    "{folder}/absent.yaml": "not a registered task",
    "broken": "cannot be loaded: .*'answer' is undefined",
    "programs": "unconfined; take our humaneval or mbpp",
    "repeats": "draws what a model writes",
    "samples": "draws what a model writes",
    "perplexity": "no score that is a mean over examples: word_perplexity",
}
CHANGES = {
    "broken": {"doc_to_target": "{{answer}}"},
    "programs": {"unsafe_code": True},
    "repeats": {"repeats": 2},
    "samples": {"generation_kwargs": {"do_sample": True, "temperature": 1.0}},
    "perplexity": {"output_type": "loglikelihood_rolling", "metric_list": [{
        "metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False
    }]},
}  # fmt: skip


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(("target", "told"), MISTAKES.items(), ids=MISTAKES)
def test_a_task_that_cannot_judge_is_refused_in_one_line(target, told, net, tmp_path):
    if target in CHANGES:
        target = write_task(tmp_path, "generate_until", **CHANGES[target])
    with pytest.raises(DeltaflError, match=told) as error:
        load_task("harness:" + target.format(folder=tmp_path), net.inputs)
    assert "\n" not in str(error.value)


def test_without_lm_eval_one_line_says_what_to_install(net, monkeypatch):
    monkeypatch.setattr("deltafl.tasks.harness.find_spec", lambda name: None)
    with pytest.raises(DeltaflError, match=r'"harness:hellaswag" needs lm-eval; pip install "del'):
        load_task("harness:hellaswag", net.inputs)
    with pytest.raises(DeltaflError, match="harness:hellaswag"):
        load_task("harness:hellaswag", ImageInput(8))


@pytest.mark.usefixtures("harness")
def test_only_what_writes_is_judged(net, tmp_path):
    task = load_task("harness:" + write_task(tmp_path, "multiple_choice"), net.inputs)
    with pytest.raises(DeltaflError, match="for causal language models of transformers"):
        task.score(tiny_net(), task.batch("test", torch.arange(2)))
