import json
import os
import shutil

import numpy as np
import pytest
import torch
from dataset_files import load, picture, png, sizes, write_parquet

from checkpoint_files import fails
from deltafl.forking import can_fork
from deltafl.tasks import ImageInput, ImageTask, load_task
from deltafl.tasks.recipe import TrainingDataRecipe


def write_set(folder, prefix="", labels=None, names=None, **options):
    """Two files of eight and four flat pictures of two classes, or of the `labels` given."""
    for split, count in (("train", 8), ("test", 4)):
        own = labels[:count] if labels else np.arange(count) % 2
        pictures = [png(picture(i)) for i in range(count)]
        write_parquet(folder / f"{prefix}{split}.parquet", pictures, own, names=names, **options)
    return folder


def write_classes(folder, classes):
    (folder / "classes.json").write_text(json.dumps(classes))


def test_parquet_folder_becomes_a_task(parquet_folder):
    task = load(parquet_folder)
    assert can_fork()  # no thread is left
    assert (task.name, task.class_names) == ("set", ("ant", "bee", "cat", "dog"))
    assert sizes(task) == [36, 4, 12]
    train, val, test = (task.splits[split] for split in ("train", "val", "test"))
    for split, first in ((train, 0), (val, 0), (test, 100)):
        assert split.images.shape == (len(split), 3, 8, 8)
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        # Picture i is flat grey first + i and of class i modulo 4: images and labels stayed together.
        assert torch.equal((split.images[:, 0, 0, 0].long() - first) % 4, split.labels)
    held_out, kept = (set(s.images[:, 0, 0, 0].tolist()) for s in (val, train))
    assert held_out | kept == set(range(40))
    assert not held_out & kept
    assert sorted(val.labels.tolist()) == [0, 1, 2, 3]
    # The seed chooses val and nothing else.
    other = load(parquet_folder, seed=1)
    assert not torch.equal(other.splits["val"].images, val.images)
    assert torch.equal(other.splits["test"].images, test.images)
    limited = load(parquet_folder, limit=8)
    assert sizes(limited) == [8, 4, 8]
    assert torch.bincount(limited.splits["train"].labels).tolist() == [2, 2, 2, 2]


def test_shards_are_one_split_in_order_and_a_validation_split_is_used_as_it_is(tmp_path, caplog):
    for name, first in (("train-00000", 0), ("train-00001", 10), ("test-00000", 0), ("dev", 200)):
        pictures = [png(picture(first + i)) for i in range(4)]
        write_parquet(tmp_path / "data" / f"{name}-of-2.parquet", pictures, [0, 1, 0, 1])
    task = load(tmp_path)
    assert task.splits["train"].images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert task.splits["val"].images[:, 0, 0, 0].tolist() == list(range(200, 204))
    assert task.class_names == ("0", "1")
    write_classes(tmp_path / "data", ["ant", "bee", "cat"])
    recipe = TrainingDataRecipe(data=str(tmp_path), augment="flip", label_smoothing=0.1)
    task = load_task(recipe, ImageInput(8))
    assert isinstance(task, ImageTask)
    assert (task.augment, task.label_smoothing) == ("flip", 0.1)
    assert 'no training example of "cat"' in caplog.text


@pytest.mark.parametrize("kind", ["", "parquet:"])
def test_one_set_of_a_folder_with_its_sidecar(tmp_path, kind):
    write_set(tmp_path, prefix="birds_")
    write_set(tmp_path, prefix="boats-")
    told = {"classes": ["tit", "rook"], "source": "here"}
    (tmp_path / "birds_classes.json").write_text(json.dumps(told))
    task = load(f"{kind}{tmp_path}/birds")
    assert (task.name, task.class_names) == ("birds", ("tit", "rook"))
    assert load(f"{kind}{tmp_path}/boats").class_names == ("0", "1")
    for name, message in (
        ("", r'holds several data sets; name one of them: ".*birds", ".*boats"'),
        ("/bird", 'bird" .* and no file of that name; did you mean "birds"'),
    ):
        fails(message, load, f"{kind}{tmp_path}{name}")


def rewritten(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def labelled(*labels, classes=("ant", "bee", "cat")):
    return lambda folder: write_classes(write_set(folder, labels=[*labels]), classes)


BAD = {
    r'"set" has no test split \(it has: train\)': lambda set: (set / "test.parquet").unlink(),
    r'set" cannot be read.*the download complete': lambda set: os.truncate(
        set / "test.parquet", 500
    ),
    r'split "train" of ".*": the label of row 4 is -1, but there are 3': labelled(
        0, 1, 2, 0, -1, 1, 2, 0
    ),
    r'split "train" of ".*": the label of row 1 is 3, but there are 3': labelled(
        0, 3, 2, 0, 1, 1, 2, 0
    ),
    "the label of row 3 is 3, but there are 3 class names": rewritten(
        "classes.json", '["a", "b", "c"]'
    ),
    "must hold a JSON list": rewritten("classes.json", "{"),
    "must hold a JSON list of class names": rewritten("classes.json", '{"classes": 3}'),
    'column "label" holds .*, not one integer a row': lambda set: write_set(set, labels=["a"] * 8),
    'column "label" holds float32, not one': lambda set: write_set(set, labels=[0.5] * 8),
    'column "label" holds float': lambda set: write_set(set, labels=[None, *[0] * 7]),
    r'row 1 of split "test" of ".*" is not an 8-bit image': lambda set: write_parquet(
        write_set(set) / "test.parquet", [png(picture(0)), None], [0, 1]
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_data_are_one_line(message, parquet_folder):
    BAD[message](parquet_folder)
    fails(message, load, parquet_folder)


def test_an_image_folder_and_bad_images_in_it(image_folder):
    task = load(image_folder)
    assert (task.name, task.class_names) == ("pictures", ("left", "right"))
    assert sizes(task) == [11, 1, 4]
    train = task.splits["train"]
    assert torch.equal((train.images[:, 0, 0, 0] >= 100).long(), train.labels)
    (image_folder / "test" / "right" / "1.png").write_bytes(b"no image")
    message = r'row 3 of split "test" of ".*" \(.*right/1\.png\) is not an 8-bit image'
    fails(message, load, image_folder)
    for file in (image_folder / "test").glob("*/*"):
        file.unlink()
    fails(r'split "test" of ".*" is empty', load, image_folder)
    shutil.rmtree(image_folder / "train")
    fails(r"no folder .* with Parquet files .* or images", load, image_folder)


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("digit", {}, 'neither a folder here nor a task by name; did you mean "digits"'),
        ("digit:inverted", {}, '"digit:inverted": cannot be imported'),
        ("no/such/folder", {}, 'there is no folder "no/such/folder"'),
        ("hub:nobody/nothing", {}, "hub:nobody/nothing. cannot be read: .*--data-dir"),
        ("json:loadz", {}, '"json:loadz": cannot be imported'),
        ("os:sep", {}, '"os:sep": is not callable'),
        ("digits", {"label_column": "x"}, "only Parquet files and hub data sets have columns"),
        ("digits", {"revision": "main"}, "only a hub data set has a revision"),
        ("digits", {"channels": 2}, "1 or 3 channels, not 2"),
        ("digits", {"limit": 0}, "limit: must be greater than or equal to 1, not 0"),
        ("digits", {"val_fraction": 1.0}, "val_fraction: must be less than 1"),
    ],
)
def test_what_cannot_be_found_or_had(spec, settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(message, load, spec, **settings)


def test_a_hub_set_by_its_columns(tmp_path, monkeypatch):
    """The hub's own layout on disk stands for a download: `datasets` reads both by the same code."""
    write_set(tmp_path / "owner" / "name" / "data", image="picture", label="kind")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    task = load("hub:owner/name", image_column="picture", label_column="kind")
    assert (task.name, task.size("test")) == ("name", 4)
    fails(r'"hub:owner/name:other" cannot be read: .*other', load, "hub:owner/name:other")


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "classes", "test"), [("dtd", 47, 1880), ("mnist", 10, 2000)])
def test_real_sets(realdata, name, classes, test):
    task = load(str(realdata / "data" / name), size=24, channels=1)
    assert (task.name, len(task.class_names), task.size("test")) == (name, classes, test)
    assert task.size("val") == round(0.1 * (task.size("train") + task.size("val")))
    counts = torch.bincount(task.groups("val"), minlength=classes)
    assert counts.max() - counts.min() <= 1
    assert 20 < task.splits["train"].images.float().mean() < 200
