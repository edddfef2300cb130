import re

import numpy as np
import pytest
from dataset_files import load, picture, png, sizes, write_parquet

from checkpoint_files import fails
from deltafl.errors import DeltaflError
from deltafl.tasks import DataRecipe
from deltafl.tasks.catalogue import catalogue, cleaned, prompt_names
from deltafl.tasks.find import find

CATALOGUE = catalogue()


def write_task(folder, classes, prefix="", splits=("train", "test"), **options):
    """Parquet files with two pictures of every class in train and one in every other split."""
    for split in splits:
        labels = np.arange(2 * classes if split == "train" else classes) % classes
        pictures = [png(picture(i)) for i in range(len(labels))]
        write_parquet(folder / f"{prefix}{split}.parquet", pictures, labels, **options)
    return str(folder)


def test_the_entries_are_whole():
    assert len(CATALOGUE) == 20
    # Only FER2013 has no hub id that could be given.
    assert [name for name, task in CATALOGUE.items() if not task.hub] == ["fer2013"]
    for name, task in CATALOGUE.items():
        assert re.fullmatch(r"([\w-]+/[\w-]+(:\w+)?)?", task.hub), name
        assert len(set(task.templates)) == len(task.templates) >= 3, name
        assert all(template.count("{}") == 1 for template in task.templates), name
        for names in filter(None, (task.class_names, task.labels)):
            assert len(set(map(str.casefold, names)) - {""}) == len(names) == task.num_classes, name


@pytest.mark.parametrize("name", ["cifar100", "sun397", "fer2013"])
def test_a_task_loads_by_name_from_a_folder_of_many(name, tmp_path):
    classes = CATALOGUE[name].num_classes
    write_task(tmp_path, classes, f"{name}_")
    write_task(tmp_path, 2, "other_")
    task = load(name, data_dir=str(tmp_path), val_fraction=0.5)
    assert (task.name, sizes(task)) == (name, [classes, classes, classes])
    assert task.class_names == (CATALOGUE[name].class_names or tuple(map(str, range(classes))))
    # The same files by another name have the names of their labels, also from the cache.
    assert load(f"{tmp_path}/{name}", val_fraction=0.5).class_names[1] == "1"


@pytest.mark.parametrize("where", ["cifar10", "cifar10/data", "svhn/cropped_digits", "mnist/mnist"])
def test_a_copy_of_the_hubs_repository_is_a_folder(where, tmp_path):
    write_task(tmp_path / where, 10, names=[f"c{i}" for i in range(10)])
    name = where.split("/")[0]
    task = load(name, data_dir=str(tmp_path))
    assert (task.name, task.class_names[3]) == (name, "c3")


def test_columns_have_usual_names_until_others_are_named(tmp_path):
    write_task(tmp_path, 100, "cifar100_", image="img", label="fine_label")
    assert load("cifar100", data_dir=str(tmp_path)).class_names[1] == "aquarium fish"
    write_task(tmp_path, 10, "cifar10_", image="picture", label="kind")
    with pytest.raises(DeltaflError, match=r'no column "image".*--image-column \(image_column\)'):
        load("cifar10", data_dir=str(tmp_path))
    with pytest.raises(DeltaflError, match=r'no column "label".*--label-column'):
        load("cifar10", data_dir=str(tmp_path), image_column="picture")
    settings = {"image_column": "picture", "label_column": "kind"}
    assert load("cifar10", data_dir=str(tmp_path), **settings).size("test") == 10


def test_food101_is_tested_on_what_its_hub_set_calls_validation(tmp_path):
    write_task(tmp_path / "food101", 101, splits=("train", "validation"))
    task = load("food101", data_dir=str(tmp_path), val_fraction=0.5)
    assert sizes(task) == [101, 101, 101]
    write_task(tmp_path / "cifar10", 10, splits=("train", "validation"))
    fails("has no test split", load, "cifar10", data_dir=str(tmp_path))


def test_yes_and_no_are_the_classes_0_and_1(tmp_path):
    for split in ("train", "valid", "test"):
        write_parquet(tmp_path / "pcam" / f"{split}.parquet", [png(picture(0))] * 2, [True, False])
    task = load("pcam", data_dir=str(tmp_path))
    assert task.splits["test"].labels.tolist() == [1, 0]
    assert "tumour" in task.class_names[1]


@pytest.mark.parametrize("count", [9, 11])
def test_another_number_of_classes_is_one_line(count, tmp_path):
    write_task(tmp_path, count, "mnist_", names=[f"c{i}" for i in range(count)])
    message = f'^task "mnist" has 10 classes, the labels of the data name {count}.*PATH.$'
    fails(message, load, "mnist", data_dir=str(tmp_path))


def test_a_folder_here_goes_before_the_hub_and_data_dir_before_it(tmp_path, monkeypatch):
    for place in ("here", "there"):
        names = [f"{place}{i}" for i in range(10)]
        write_task(tmp_path / place / "cifar10", 10, names=names)
    monkeypatch.chdir(tmp_path / "here")
    assert load("cifar10").class_names[0] == "here0"
    assert load("cifar10", data_dir=str(tmp_path / "there")).class_names[0] == "there0"


def test_without_a_folder_the_hub_is_asked_for_the_id(monkeypatch):
    asked = []

    def read_tables(repo, where, name, revision):
        asked.append((repo, name, revision))
        raise DeltaflError("no network.")

    monkeypatch.setattr("deltafl.tasks.tables.read_tables", read_tables)
    for name, revision in (("cifar100", None), ("svhn", "abc")):
        with pytest.raises(DeltaflError, match="no network"):
            find(DataRecipe.of(data=name, revision=revision))
    svhn = ("ufldl-stanford/svhn", "cropped_digits", "abc")
    assert asked == [("tanganke/cifar100", None, None), svhn]


@pytest.mark.parametrize(
    ("spec", "data_dir", "message"),
    [
        ("mnist", None, r"hub:ylecun/mnist.*--data-dir"),
        ("cifar1000", None, 'no data "cifar1000".*did you mean "cifar100"'),
        ("fer2013", None, 'task "fer2013" is on no hub under a known id.*--data-dir'),
        ("cifar1000", ".", r'there is no folder ".*cifar1000" .*; known: birds'),
        ("cifar100", ".", r'there is no folder ".*cifar100" .*; known: birds'),
        ("digits", ".", r'data_dir ".*" is for a task by its name'),
        ("hub:tanganke/dtd", ".", r'data_dir ".*" is for a task by its name'),
        ("./cifar10", ".", r'data_dir ".*" is for a task by its name'),
        ("birds", "nowhere", "there is no folder"),
    ],
)
def test_names_that_lead_nowhere(spec, data_dir, message, tmp_path, monkeypatch):
    monkeypatch.chdir(write_task(tmp_path, 2, "birds_"))
    fails(message, load, spec, data_dir=data_dir)


def test_labels_become_words():
    words = {
        "aquarium_fish": "aquarium fish",
        "AnnualCrop": "Annual Crop",
        "/a/airport_terminal": "airport terminal",
        "bow_window/indoor": "bow window indoor",
        "McLaren MP4-12C Coupe 2012": "McLaren MP4-12C Coupe 2012",
        "BMW_M3": "BMW M3",
        "apple_pie ": "apple pie",
    }
    assert {label: cleaned(label) for label in words} == words


def test_prompt_names_follow_the_labels_whatever_their_order():
    known, eurosat = CATALOGUE["cifar10"].class_names or (), CATALOGUE["eurosat"]
    assert prompt_names("cifar10", [str(i) for i in range(10)]) == known
    backwards = [name.upper() for name in reversed(known)]
    assert prompt_names("cifar10", backwards) == tuple(reversed(known))
    assert prompt_names("eurosat", eurosat.labels) == eurosat.class_names
    # One unknown word: the data's own names, none given to another class.
    mixed = ("plane", *known[1:])
    assert prompt_names("cifar10", mixed) == mixed
    assert prompt_names("birds", ["blue_tit", "GreyHeron"]) == ("blue tit", "Grey Heron")
    assert prompt_names("sun397", [f"/a/scene_{i}" for i in range(397)])[5] == "scene 5"
    message = 'task "sun397" has numbers for class names.*sun397_classes.json'
    fails(message, lambda: prompt_names("sun397", [*map(str, range(397))]))
