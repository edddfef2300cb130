import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from deltafl.cli.evaluate import evaluate as evaluate_command
from deltafl.cli.finetune import finetune as finetune_command
from deltafl.errors import DeltaflError
from deltafl.models import HeadRecipe, load_net, zero_shot
from deltafl.models.head import Head, load_head, save_head
from deltafl.models.zero_shot import read_templates, zero_shot_head
from deltafl.sparse.fisher import FisherScorer
from deltafl.tasks import Images, ImageTask
from deltafl.tasks.catalogue import catalogue
from deltafl.tasks.task import SPLITS
from deltafl.training import TrainingRecipe, evaluate, finetune
from tiny_models import tiny_clip, tiny_net

NAMES = ("ant", "bee", "blue tit")
TEMPLATES = ("a photo of a {}.", "{}", "one small {} here")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, *tiny_clip(folder)


@pytest.fixture
def clip(made, tmp_path, monkeypatch) -> Path:
    """A copy of the model, and a cache of one's own."""
    monkeypatch.setenv("DELTAFL_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made[0], tmp_path / "clip")
    return tmp_path / "clip"


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed)
    ).to(torch.uint8)


def task(name: str = "insects") -> ImageTask:
    labels = torch.arange(12) % len(NAMES)
    splits = {split: Images(images(12, i), labels) for i, split in enumerate(SPLITS)}
    return ImageTask(name, splits, NAMES)


def test_logits_are_those_of_transformers(made, clip):
    _, model, tokenizer = made
    head = zero_shot_head(str(clip), "insects", NAMES, templates=TEMPLATES[:1])
    net = load_net(clip)
    pixels = net.inputs.normalise(images(5))
    tokens = tokenizer(
        [TEMPLATES[0].replace("{}", name) for name in NAMES], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**tokens, pixel_values=pixels).logits_per_image
        found = head(net.module.features(images(5)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert (expected.std(0) > 0.1).any()
    assert expected.std(1).max() > 0.1  # else any head would do


def test_several_templates_are_one_mean_direction(made, clip):
    _, model, tokenizer = made
    head = zero_shot_head(str(clip), "insects", NAMES, templates=TEMPLATES)
    with torch.no_grad():
        for row, name in zip(head.weight, NAMES, strict=True):
            units = []
            for template in TEMPLATES:  # one by one, so without padding
                tokens = tokenizer([template.replace("{}", name)], return_tensors="pt")
                embedding = model.text_projection(model.text_model(**tokens).pooler_output)[0]
                units.append(embedding / embedding.norm())
            mean = torch.stack(units).mean(0)
            torch.testing.assert_close(
                row, mean / mean.norm() * model.logit_scale.exp(), rtol=1e-4, atol=1e-4
            )
    assert head.class_names == NAMES
    assert not head.bias.any()


def test_the_catalogues_words_and_templates_are_the_default(clip):
    labels = catalogue()["eurosat"].labels
    words = catalogue()["eurosat"].class_names
    assert labels is not None
    assert words is not None
    head = zero_shot_head(str(clip), "eurosat", labels)
    same = zero_shot_head(str(clip), "other", words, templates=catalogue()["eurosat"].templates)
    assert torch.equal(head.weight, same.weight)
    assert (head.class_names, same.class_names) == (labels, words)


def test_a_head_is_computed_once_for_each_model_task_and_templates(clip, monkeypatch, tmp_path):
    made_for = []
    compute = zero_shot._weights
    monkeypatch.setattr(zero_shot, "_weights", lambda *a: made_for.append(a) or compute(*a))

    def head(name="insects", names=NAMES, templates=TEMPLATES):
        return zero_shot_head(str(clip), name, names, templates=templates)

    first, again = head(), head()
    assert torch.equal(first.weight, again.weight)
    assert len(made_for) == 1
    head(templates=TEMPLATES[:2])
    head(names=("ant", "bee", "wasp"))
    head(name="animals")  # whose classes are called the same
    assert len(made_for) == 3
    tiny_clip(clip, seed=1)
    assert not torch.equal(head().weight, first.weight)
    assert len(made_for) == 4
    for file in (tmp_path / "cache").glob("*.npy"):
        file.write_bytes(b"broken")
    head()
    assert len(made_for) == 5


def test_a_normalised_head_is_saved_as_one(clip, tmp_path):
    head = zero_shot_head(str(clip), "insects", NAMES)
    save_head(head, tmp_path / "head.safetensors")
    loaded = load_head(tmp_path / "head.safetensors")
    features = 7 * torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(features), head(features))
    torch.testing.assert_close(loaded(10 * features), loaded(features))
    plain = Head(head.weight, head.bias, NAMES)
    save_head(plain, tmp_path / "plain.safetensors")
    assert not load_head(tmp_path / "plain.safetensors").normalised


def test_fine_tuning_evaluating_and_resuming_with_it(clip, tmp_path):
    recipe = TrainingRecipe.of(
        model=str(clip), data="insects", steps=4, lr=1e-3, batch_size=4, head="zero-shot", save_every=2, device="cpu"
    )  # fmt: skip
    data, out = task(), tmp_path / "tuned"
    finetune(load_net(clip), data, recipe.replace(out=str(out)))
    head = load_head(out / "head.safetensors")
    assert torch.equal(head.weight, zero_shot_head(str(clip), "insects", NAMES).weight)
    assert head.normalised

    class KilledError(Exception):
        pass

    def kill(progress):
        if (progress.name, progress.done) == ("steps", 3):
            raise KilledError

    cut = recipe.replace(out=str(tmp_path / "b"))
    with pytest.raises(KilledError):
        finetune(load_net(clip), data, cut, on_progress=kill)
    finetune(load_net(clip), data, cut, resume=True)
    for file in ("model.safetensors", "head.safetensors"):
        assert (tmp_path / "b" / file).read_bytes() == (out / file).read_bytes()
    # The fine-tuned folder holds the image tower only: the text tower is its base's.
    given, net = evaluate(load_net(out), data), load_net(out)
    net.prepare(data, HeadRecipe(head="zero-shot"))
    assert torch.equal(evaluate(net, data).scores, given.scores)


def test_sensitivity_is_that_of_the_normalised_logits(clip):
    net, data, ids = load_net(str(clip)), task(), torch.arange(4)
    net.module.head = zero_shot_head(str(clip), "insects", NAMES)
    name = "encoder.visual_projection.weight"
    weight = net.module.get_parameter(name)
    found = FisherScorer(net, data, "empirical")(ids, torch.Generator())[name]
    expected = torch.zeros_like(weight)
    for i in ids:
        loss = data.loss(net, data.batch("train", i[None]))[0].sum()
        expected += torch.autograd.grad(loss, [weight])[0].square()
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-6)
    assert expected.max() > 1e-3


def pictures(folder: Path) -> None:
    for split in ("train", "test"):
        for name, grey in (("ant", 40), ("bee", 200)):
            (folder / split / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (8, 8), (grey + i,) * 3).save(folder / split / name / f"{i}.png")


def test_from_the_command_line(clip, tmp_path):
    pictures(tmp_path / "data" / "insects")
    (tmp_path / "templates.txt").write_text("a {}.\n\n  the {} \n")
    shared = ("--data", "insects", "--data-dir", tmp_path / "data", "--head", "zero-shot")
    shared = [
        str(a) for a in (*shared, "--templates", tmp_path / "templates.txt", "--device", "cpu")
    ]
    out = tmp_path / "tuned"
    run = CliRunner().invoke(
        finetune_command, ["--base", str(clip), "--out", str(out), "--steps", "1", *shared]
    )
    assert run.exception is None, run.exception
    expected = zero_shot_head(str(clip), "insects", ("ant", "bee"), templates=("a {}.", "the {}"))
    assert torch.equal(load_head(out / "head.safetensors").weight, expected.weight)
    assert json.loads((out / "training.json").read_text())["head"]["head"] == "zero-shot"
    scored = tmp_path / "scores.json"
    run = CliRunner().invoke(
        evaluate_command, ["--models", str(clip), str(out), "--json", str(scored), *shared]
    )
    assert run.exception is None, run.exception
    assert [row["examples"] for row in json.loads(scored.read_text())["results"]] == [12, 12]


def test_what_a_model_must_have(clip, tmp_path):
    vit = tmp_path / "vit"
    vit.mkdir()
    tiny_net().save(vit)
    with pytest.raises(DeltaflError, match='is a "vit" and no CLIP model with a text tower'):
        zero_shot_head(str(vit), "insects", NAMES)
    tower = tmp_path / "tower"
    tower.mkdir()
    load_net(clip).save(tower)
    with pytest.raises(
        DeltaflError, match='is a "clip_vision_model" and no CLIP model with a text tower'
    ):
        zero_shot_head(str(tower), "insects", NAMES)
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        (clip / file).unlink(missing_ok=True)
    with pytest.raises(DeltaflError, match="has no tokenizer"):
        zero_shot_head(str(clip), "insects", NAMES)


def test_another_number_of_classes(clip):
    with pytest.raises(
        DeltaflError, match='task "mnist" has 3 classes, the one of that name in the catalogue 10'
    ):
        zero_shot_head(str(clip), "mnist", NAMES)


def test_templates_that_will_not_do(clip, tmp_path):
    with pytest.raises(DeltaflError, match=r'template "a photo" has no \{\}'):
        zero_shot_head(str(clip), "insects", NAMES, templates=["a {}", "a photo"])
    with pytest.raises(DeltaflError, match="no templates"):
        zero_shot_head(str(clip), "insects", NAMES, templates=[])
    with pytest.raises(DeltaflError, match="cannot be read"):
        read_templates(tmp_path / "none.txt")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DeltaflError, match="holds none"):
        read_templates(tmp_path / "blank.txt")
    with pytest.raises(DeltaflError, match="templates are about the zero-shot head"):
        HeadRecipe.of(templates="x")
