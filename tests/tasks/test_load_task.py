import json

import numpy as np
import pytest
import torch
from dataset_files import load, picture, png, sizes, write_parquet

from deltafl.errors import DeltaflError
from deltafl.tasks import ImageInput, ImageTask, load_task
from deltafl.tasks.recipe import TrainingDataRecipe

CONFUSED = ["ant", "bee", "cat"]


def write_set(folder, train=8, test=4, prefix="", labels=None, **options):
    """Two files of flat pictures of two classes; `labels` replaces those of the training file."""
    for split, count in (("train", train), ("test", test)):
        own = labels if labels is not None and split == "train" else np.arange(count) % 2
        write_parquet(
            folder / f"{prefix}{split}.parquet",
            [png(picture(i)) for i in range(count)],
            own,
            **options,
        )
    return folder


def test_parquet_folder_becomes_a_task(parquet_folder):
    task = load(parquet_folder)
    assert task.name == "set"
    assert task.class_names == ("ant", "bee", "cat", "dog")
    assert sizes(task) == [36, 4, 12]
    train, val, test = (task.splits[split] for split in ("train", "val", "test"))
    for split, first in ((train, 0), (val, 0), (test, 100)):
        assert split.images.shape == (len(split), 3, 8, 8)
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        # Picture i is flat grey first + i and of class i modulo 4: images and labels stayed together.
        assert torch.equal((split.images[:, 0, 0, 0].long() - first) % 4, split.labels)
    held_out, kept = (set(s.images[:, 0, 0, 0].tolist()) for s in (val, train))
    assert held_out | kept == set(range(40))
    assert not held_out & kept
    assert sorted(val.labels.tolist()) == [0, 1, 2, 3]


def test_the_seed_chooses_val_and_nothing_else(parquet_folder):
    a, b, again = (load(parquet_folder, seed=s) for s in (0, 1, 0))
    images = [{split: part.images for split, part in t.splits.items()} for t in (a, b, again)]
    assert torch.equal(images[0]["val"], images[2]["val"])
    assert not torch.equal(images[0]["val"], images[1]["val"])
    assert torch.equal(images[0]["test"], images[1]["test"])


def test_limit_is_stratified_and_by_split(parquet_folder):
    task = load(parquet_folder, limit=8)
    assert sizes(task) == [8, 4, 8]
    assert torch.bincount(task.splits["train"].labels).tolist() == [2, 2, 2, 2]


def test_a_validation_split_is_used_as_it_is(parquet_folder):
    write_parquet(
        parquet_folder / "validation.parquet",
        [png(picture(200 + i)) for i in range(8)],
        np.arange(8) % 4,
    )
    task = load(parquet_folder)
    assert len(task.splits["train"]) == 40
    assert task.splits["val"].images[:, 0, 0, 0].tolist() == list(range(200, 208))


def test_shards_are_one_split_in_order(tmp_path):
    for shard in range(2):
        pictures = [png(picture(10 * shard + i)) for i in range(4)]
        write_parquet(
            tmp_path / "data" / f"train-0000{shard}-of-00002.parquet", pictures, np.arange(4) % 2
        )
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [png(picture(9))] * 2, [0, 1])
    write_parquet(
        tmp_path / "data" / "validation-00000-of-00001.parquet", [png(picture(9))] * 2, [0, 1]
    )
    task = load(tmp_path)
    assert task.splits["train"].images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert task.class_names == ("0", "1")


@pytest.mark.parametrize("kind", ["", "parquet:"])
def test_one_set_of_a_folder_with_its_sidecar(tmp_path, kind):
    write_set(tmp_path, prefix="birds_")
    write_set(tmp_path, prefix="boats-")
    (tmp_path / "birds_classes.json").write_text(
        json.dumps({"classes": ["tit", "rook"], "source": "here"})
    )
    task = load(f"{kind}{tmp_path}/birds")
    assert (task.name, task.class_names) == ("birds", ("tit", "rook"))
    assert load(f"{kind}{tmp_path}/boats").class_names == ("0", "1")
    with pytest.raises(
        DeltaflError, match=r'holds several data sets; name one of them: ".*birds", ".*boats"'
    ):
        load(f"{kind}{tmp_path}")
    with pytest.raises(
        DeltaflError, match='bird" and no Parquet file of that name; did you mean "birds"'
    ):
        load(f"{kind}{tmp_path}/bird")


def test_columns_have_settings(tmp_path):
    write_set(tmp_path, image="img", label="fine_label")
    with pytest.raises(
        DeltaflError, match=r'no column "label"; did you mean "fine_label"\? .* --label-column'
    ):
        load(tmp_path, image_column="img")
    with pytest.raises(DeltaflError, match=r'no column "image".* --image-column \(image_column\)'):
        load(tmp_path)
    task = load(tmp_path, image_column="img", label_column="fine_label")
    assert task.size("test") == 4


def test_the_old_way_to_name_columns_is_refused_with_the_new(tmp_path):
    with pytest.raises(
        DeltaflError, match=r"keys of its own now: image_column .for image., label_column"
    ) as error:
        load(f"{tmp_path}?image=img&label=fine_label")
    assert "\n" not in str(error.value)


def test_image_folder(image_folder):
    task = load(image_folder)
    assert (task.name, task.class_names) == ("pictures", ("left", "right"))
    assert sizes(task) == [11, 1, 4]
    assert torch.equal(
        (task.splits["train"].images[:, 0, 0, 0] >= 100).long(), task.splits["train"].labels
    )


def test_a_broken_file_of_an_image_folder_is_named(image_folder):
    (image_folder / "test" / "right" / "1.png").write_bytes(b"no image")
    with pytest.raises(
        DeltaflError, match=r"row 3 of image folder .*test.*right/1\.png\) is not an 8-bit image"
    ):
        load(image_folder)


def test_missing_test_split(parquet_folder):
    (parquet_folder / "test.parquet").unlink()
    with pytest.raises(DeltaflError, match=r'"set" has no test split \(it has: train\)'):
        load(parquet_folder)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes(tmp_path, label):
    write_set(tmp_path, labels=[0, 1, 2, 0, label, 1, 2, 0])
    (tmp_path / "classes.json").write_text(json.dumps(CONFUSED))
    with pytest.raises(
        DeltaflError, match=rf"train\.parquet: the label of row 4 is {label}, but there are 3 class"
    ):
        load(tmp_path)


def test_two_lists_of_class_names_must_agree(tmp_path):
    write_set(tmp_path, names=["ant", "bee"])
    (tmp_path / "classes.json").write_text(json.dumps(CONFUSED))
    with pytest.raises(DeltaflError, match="declares 2 classes, but there are 3 class names"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "must hold a JSON list"), ('{"classes": 3}', "must hold a JSON list")],
)
def test_a_bad_sidecar(tmp_path, content, message):
    write_set(tmp_path)
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(DeltaflError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("labels", [["a"] * 8, [0.5] * 8, [None, *[0] * 7]])
def test_labels_that_are_no_integers(tmp_path, labels):
    write_set(tmp_path, labels=labels)
    # One file with other types than its sister cannot be loaded at all, so both have them.
    write_parquet(tmp_path / "test.parquet", [png(picture(i)) for i in range(8)], labels)
    with pytest.raises(DeltaflError, match=r'column "label" holds .*not one integer a row'):
        load(tmp_path)


def test_a_null_image_is_named(tmp_path):
    write_set(tmp_path)
    write_parquet(tmp_path / "test.parquet", [png(picture(0)), None], [0, 1])
    with pytest.raises(DeltaflError, match=r"row 1 of .*test\.parquet is not an 8-bit image"):
        load(tmp_path)


def test_an_empty_split(image_folder):
    for file in (image_folder / "test").glob("*/*"):
        file.unlink()
    with pytest.raises(DeltaflError, match=r'image folder ".*test" is empty'):
        load(image_folder)


def test_a_truncated_parquet_file(parquet_folder):
    file = parquet_folder / "test.parquet"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(
        DeltaflError, match=r"test\.parquet.* cannot be read.*the download complete"
    ):
        load(parquet_folder)


def test_a_class_without_training_examples_is_reported(tmp_path, caplog):
    write_set(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps(CONFUSED))
    load(tmp_path)
    assert 'no training example of "cat"' in caplog.text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "digit",
            'neither a folder here, a registered family nor a task by name; did you mean "digits"',
        ),
        ("digit:inverted", 'module "digit" cannot be imported.*did you mean "digits"'),
        ("no/such/folder", 'there is no folder "no/such/folder"'),
        ("hub:nobody/nothing", "hub:nobody/nothing. cannot be read: .*--data-dir"),
        ("json:loadz", 'has no callable "loadz"; did you mean "load'),
        ("os:sep", 'has no callable "sep"'),
    ],
)
def test_what_cannot_be_found(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DeltaflError, match=message):
        load(spec)


def test_an_empty_folder(tmp_path):
    with pytest.raises(DeltaflError, match=r"holds neither Parquet files .* nor images"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_column": "x"}, "only Parquet files and hub data sets have columns"),
        ({"revision": "main"}, "only a hub data set has a revision"),
        ({"channels": 2}, "1 or 3 channels, not 2"),
        ({"limit": 0}, "limit: must be greater than or equal to 1, not 0"),
        ({"val_fraction": 1.0}, "val_fraction: must be less than 1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(DeltaflError, match=message):
        load("digits", **settings)


def test_training_data_say_how_a_model_sees_them(parquet_folder):
    recipe = TrainingDataRecipe(data=str(parquet_folder), augment="flip", label_smoothing=0.1)
    task = load_task(recipe, ImageInput(8))
    assert isinstance(task, ImageTask)
    assert (task.augment, task.label_smoothing) == ("flip", 0.1)


def test_a_hub_set_by_its_columns(tmp_path, parquet_folder, monkeypatch):
    """The hub's own layout on disk stands for a download: `datasets` reads both by the same code."""
    write_set(tmp_path / "owner" / "name" / "data", image="img", label="fine_label")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    task = load("hub:owner/name", image_column="img", label_column="fine_label")
    assert (task.name, len(task.splits["test"])) == ("name", 4)


def test_a_hub_configuration_that_is_not_there(tmp_path, monkeypatch):
    write_set(tmp_path / "owner" / "name" / "data")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DeltaflError, match=r'"hub:owner/name:other" cannot be read: .*other'):
        load("hub:owner/name:other")


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "classes", "test"), [("dtd", 47, 1880), ("mnist", 10, 2000)])
def test_real_sets(realdata, name, classes, test):
    task = load(str(realdata / "data" / name), size=24, channels=1)
    assert (task.name, len(task.class_names), len(task.splits["test"])) == (name, classes, test)
    assert len(task.splits["val"]) == round(
        0.1 * (len(task.splits["train"]) + len(task.splits["val"]))
    )
    counts = torch.bincount(task.splits["val"].labels, minlength=classes)
    assert counts.max() - counts.min() <= 1
    assert 20 < task.splits["train"].images.float().mean() < 200
