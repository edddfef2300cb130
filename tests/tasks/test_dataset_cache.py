import os
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import load, picture, png, write_parquet

from checkpoint_files import fails
from deltafl.tasks import ImageInput


@pytest.fixture
def decodes(monkeypatch):
    """The list grows by one for each image that is decoded."""
    calls, real = [], ImageInput.decode
    monkeypatch.setattr(ImageInput, "decode", lambda *image: calls.append(image) or real(*image))
    return calls


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def test_a_second_load_decodes_nothing_and_opens_nothing(
    parquet_folder, cache, decodes, monkeypatch
):
    first = load(parquet_folder)
    assert len(decodes) == 52
    # nothing stays beside the entry
    assert sorted(file.suffix for file in cache.iterdir()) == [".bin", ".json"]
    monkeypatch.setattr(
        "deltafl.tasks.tables.read_tables", lambda *_: pytest.fail("the source was opened")
    )
    again = load(parquet_folder)
    assert len(decodes) == 52
    assert (first.name, first.class_names) == (again.name, again.class_names)
    for split in ("train", "val", "test"):
        assert torch.equal(first.splits[split].images, again.splits[split].images)
        assert torch.equal(first.splits[split].labels, again.splits[split].labels)
    # No write into a task reaches the file.
    again.splits["test"].images.zero_()
    assert load(parquet_folder).splits["test"].images.any()


@pytest.mark.parametrize(
    "change", [{"size": 6}, {"channels": 1}, {"seed": 1}, {"limit": 4}, {"val_fraction": 0.2}]
)
def test_whatever_changes_the_bytes_is_another_entry(parquet_folder, decodes, change):
    load(parquet_folder)
    before = len(decodes)
    load(parquet_folder, **change)
    assert len(decodes) > before


def test_files_that_change_are_read_again(parquet_folder, image_folder, decodes):
    load(parquet_folder)
    write_parquet(parquet_folder / "test.parquet", [png(picture(9))] * 4, np.arange(4))
    assert load(parquet_folder).size("test") == 4
    assert len(decodes) == 52 + 44
    assert load(image_folder).class_names == ("left", "right")
    for split in ("train", "test"):
        (image_folder / split / "left").rename(image_folder / split / "up")
    task = load(image_folder)
    assert task.class_names == ("right", "up")
    assert (task.splits["test"].images[task.splits["test"].labels == 1] < 100).all()


@pytest.mark.parametrize("kind", ["bin", "json"])
@pytest.mark.parametrize("damage", [lambda content: content[:-10], lambda content: b"broken"])
def test_a_damaged_entry_is_made_again(parquet_folder, cache, decodes, damage, kind, caplog):
    expected = load(parquet_folder).splits["train"].images.clone()
    (file,) = cache.glob(f"*.{kind}")
    file.write_bytes(damage(file.read_bytes()))
    assert torch.equal(load(parquet_folder).splits["train"].images, expected)
    assert len(decodes) == 104
    assert "is damaged" in caplog.text


def test_killed_while_writing_the_entry_is_not_there(parquet_folder, cache, decodes, monkeypatch):
    def killed(*names):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            load(parquet_folder)
    assert not list(cache.iterdir())
    load(parquet_folder)
    load(parquet_folder)
    assert len(decodes) == 104


def test_a_failure_leaves_no_entry_and_a_cache_that_cannot_be_written_is_an_error(
    parquet_folder, cache, tmp_path, monkeypatch
):
    write_parquet(tmp_path / "s" / "train.parquet", [png(picture(1))] * 4, np.arange(4) % 2)
    write_parquet(tmp_path / "s" / "test.parquet", [png(picture(1)), b"bad"], np.arange(2))
    fails('row 1 of split "test"', load, tmp_path / "s")
    assert not list(cache.iterdir())

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        fails("No space left on device", load, parquet_folder)
    assert not list(cache.iterdir())
    (cache / "file").write_text("")
    monkeypatch.setenv("DELTAFL_CACHE", str(cache / "file" / "cache"))
    fails(r"cache folder .* cannot be written.*DELTAFL_CACHE", load, parquet_folder)
    monkeypatch.delenv("DELTAFL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    load(parquet_folder)
    assert list((tmp_path / ".cache" / "deltafl").glob("*.json"))
