import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_files import fails
from deltafl.errors import DeltaflError
from deltafl.models import HeadRecipe, load_net, zero_shot
from deltafl.models.head import Head, load_head
from deltafl.models.zero_shot import zero_shot_head
from deltafl.sparse.fisher import FisherScorer
from deltafl.tasks import Images, ImageTask
from deltafl.tasks.catalogue import catalogue
from deltafl.tasks.task import SPLITS
from deltafl.training import TrainingRecipe, evaluate, finetune
from tiny_models import saved, tiny_clip, tiny_net

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


def head_of(model: Path, name="insects", names=NAMES, templates=None) -> Head:
    """The head of a task called `name`, with prompts from a file of theirs."""
    file = model.parent / "prompts.txt"
    file.write_text("\n".join(templates or ()))
    return zero_shot_head(str(model), task(name, names), str(file) if templates else None)


def images(count: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 8, 8), generator=draw).to(torch.uint8)


def task(name: str = "insects", names=NAMES) -> ImageTask:
    labels = torch.arange(12) % len(NAMES)
    splits = {split: Images(images(12, i), labels) for i, split in enumerate(SPLITS)}
    return ImageTask(name, splits, tuple(names))


def test_logits_are_those_of_transformers_and_several_templates_one_mean_direction(made, clip):
    _, model, tokenizer = made
    head = head_of(clip, templates=TEMPLATES)
    with torch.no_grad():
        for row, name in zip(head.weight, NAMES, strict=True):
            units = []
            for template in TEMPLATES:  # one by one, so without padding
                tokens = tokenizer([template.replace("{}", name)], return_tensors="pt")
                embedding = model.text_projection(model.text_model(**tokens).pooler_output)[0]
                units.append(embedding / embedding.norm())
            mean = torch.stack(units).mean(0)
            wanted = mean / mean.norm() * model.logit_scale.exp()
            torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)
    assert head.class_names == NAMES
    assert not head.bias.any()
    head = head_of(clip, templates=TEMPLATES[:1])
    net, prompts = load_net(clip), [TEMPLATES[0].replace("{}", name) for name in NAMES]
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        pixels = net.inputs.normalise(images(5))
        expected = model(**tokens, pixel_values=pixels).logits_per_image
        found = head(net.module.features(images(5)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert (expected.std(0) > 0.1).any()
    assert expected.std(1).max() > 0.1  # else any head would do


def test_the_catalogues_words_and_templates_are_the_default(clip):
    eurosat = catalogue()["eurosat"]
    words = eurosat.class_names or ()
    head = head_of(clip, "eurosat", eurosat.labels)
    same = head_of(clip, "other", words, eurosat.templates)
    assert torch.equal(head.weight, same.weight)
    assert (head.class_names, same.class_names) == (eurosat.labels, words)


def test_a_head_is_computed_once_for_each_model_task_and_templates(clip, monkeypatch, tmp_path):
    made_for = []
    compute = zero_shot._embedded
    monkeypatch.setattr(zero_shot, "_embedded", lambda *a: made_for.append(a) or compute(*a))

    def head(name="insects", names=NAMES, templates=TEMPLATES):
        return head_of(clip, name, names, templates)

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
    for file in (tmp_path / "cache").glob("*.json"):
        file.write_bytes(b"broken")
    head()
    assert len(made_for) == 5


def test_fine_tuning_evaluating_and_resuming_with_it(clip, tmp_path):
    recipe = TrainingRecipe.of(
        model=str(clip), data="insects", steps=4, lr=1e-3, batch_size=4, head="zero-shot", save_every=2, device="cpu"
    )  # fmt: skip
    data, out = task(), tmp_path / "tuned"
    finetune(load_net(clip), data, recipe.replace(out=str(out)))
    head = load_head(out / "head.safetensors")
    assert torch.equal(head.weight, head_of(clip).weight)
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
    net.module.head = head_of(clip)
    name = "encoder.visual_projection.weight"
    weight = net.module.get_parameter(name)
    found = FisherScorer(net, data, "empirical")(ids, torch.Generator())[name]
    expected = torch.zeros_like(weight)
    for i in ids:
        loss = data.loss(net, data.batch("train", i[None]))[0].sum()
        expected += torch.autograd.grad(loss, [weight])[0].square()
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-6)
    assert expected.max() > 1e-3


@pytest.mark.parametrize("kind", ["vit", "clip_vision_model"])
def test_a_model_must_have_a_text_tower(kind, clip, tmp_path):
    saved(tiny_net() if kind == "vit" else load_net(clip), tmp_path / "other")
    message = f'is a "{kind}" and no CLIP model with a text tower'
    fails(message, head_of, tmp_path / "other")


def test_a_text_tower_must_be_whole_and_have_a_tokenizer(clip):
    tensors = load_file(clip / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.startswith("text_model.")}
    save_file(kept, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DeltaflError, match=r"text_model.* missing or misshapen in the file"):
        head_of(clip)
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        (clip / file).unlink(missing_ok=True)
    fails("has no tokenizer", head_of, clip)


def test_templates_and_classes_that_will_not_do(clip, tmp_path):
    message = 'task "mnist" has 3 classes, the one of that name in the catalogue 10'
    fails(message, head_of, clip, "mnist")
    fails(r'prompts.txt": "a photo" has no \{\}', head_of, clip, templates=["a {}", "a photo"])
    fails(r'prompts.txt": there is none', head_of, clip, templates=["", " "])
    fails("cannot be read", zero_shot_head, str(clip), task(), str(tmp_path / "none.txt"))
