import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import load, picture, png, write_parquet

from deltafl.errors import DeltaflError
from deltafl.tasks import cache, decoding


@pytest.fixture
def decodes(monkeypatch):
    """The list grows by one for each image that is decoded."""
    calls = []
    real = decoding.decode

    def counted(encoded, geometry):
        calls.append(geometry)
        return real(encoded, geometry)

    monkeypatch.setattr(decoding, "decode", counted)
    return calls


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != "hashes"]


def test_a_second_load_decodes_nothing_and_opens_nothing(
    parquet_folder, tmp_path, decodes, monkeypatch
):
    first = load(parquet_folder)
    assert len(decodes) == 52
    monkeypatch.setattr(
        "deltafl.tasks.tables.read_parquet", lambda *_: pytest.fail("the source was opened")
    )
    again = load(parquet_folder)
    assert len(decodes) == 52
    assert (first.name, first.class_names) == (again.name, again.class_names)
    for split in ("train", "val", "test"):
        assert torch.equal(first.splits[split].images, again.splits[split].images)
        assert torch.equal(first.splits[split].labels, again.splits[split].labels)


def test_nothing_stays_beside_the_entry(parquet_folder, tmp_path):
    load(parquet_folder)
    assert [len(path.name) for path in entries(tmp_path / "cache")] == [64]


def test_the_cache_folder_comes_from_the_environment(parquet_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAFL_CACHE", str(tmp_path / "named"))
    load(parquet_folder)
    assert entries(tmp_path / "named")
    monkeypatch.delenv("DELTAFL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path / ".cache" / "deltafl"


@pytest.mark.parametrize(
    "change", [{"size": 6}, {"channels": 1}, {"seed": 1}, {"limit": 4}, {"val_fraction": 0.2}]
)
def test_whatever_changes_the_bytes_is_another_entry(parquet_folder, decodes, change):
    load(parquet_folder)
    before = len(decodes)
    load(parquet_folder, **change)
    assert len(decodes) > before


def test_content_counts_and_not_the_place(parquet_folder, tmp_path, decodes):
    load(parquet_folder)
    moved = shutil.copytree(parquet_folder, tmp_path / "elsewhere" / "set")
    load(moved)
    assert len(decodes) == 52
    write_parquet(moved / "test.parquet", [png(picture(9))] * 4, np.arange(4))
    assert len(load(moved).splits["test"]) == 4


def test_a_renamed_class_is_new_content(image_folder):
    assert load(image_folder).class_names == ("left", "right")
    for split in ("train", "test"):
        (image_folder / split / "left").rename(image_folder / split / "up")
    task = load(image_folder)
    assert task.class_names == ("right", "up")
    assert (task.splits["test"].images[task.splits["test"].labels == 1] < 100).all()


def test_a_hash_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    first = cache.content_hash([file], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
        assert cache.content_hash([file], tmp_path) == first
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert cache.content_hash([file], tmp_path) != first


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "json"])
def test_a_damaged_entry_is_made_again(parquet_folder, tmp_path, decodes, damage, caplog):
    intact = load(parquet_folder)
    expected = intact.splits["train"].images.clone()
    entry = entries(tmp_path / "cache")[0]
    file = entry / "train_images.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "flip":
        file.write_bytes(content)
        os.utime(file, ns=(1, 1))
    elif damage == "cut":
        file.write_bytes(content[:-10])
    elif damage == "remove":
        file.unlink()
    else:
        (entry / "entry.json").write_text("[")
    again = load(parquet_folder)
    assert torch.equal(again.splits["train"].images, expected)
    assert len(decodes) == 104
    assert "is damaged" in caplog.text


def test_a_failure_leaves_no_entry(tmp_path):
    good = png(picture(1))
    write_parquet(tmp_path / "s" / "train.parquet", [good] * 8, np.arange(8) % 2)
    write_parquet(tmp_path / "s" / "test.parquet", [good, b"bad", good, good], np.arange(4) % 2)
    with pytest.raises(DeltaflError, match=r"row 1 of .*test\.parquet"):
        load(str(tmp_path / "s"))
    assert entries(tmp_path / "cache") == []


def test_the_first_of_two_writers_stays(parquet_folder, tmp_path, monkeypatch):
    load(parquet_folder)
    entry = entries(tmp_path / "cache")[0]
    before = (entry / "entry.json").stat().st_ino
    real, answers = cache._read, iter([None])
    monkeypatch.setattr(cache, "_read", lambda *a: next(answers, "real") and real(*a))
    load(parquet_folder)
    assert (entry / "entry.json").stat().st_ino == before
    assert entries(tmp_path / "cache") == [entry]


def test_a_write_into_the_task_does_not_reach_the_file(parquet_folder):
    task = load(parquet_folder)
    task.splits["test"].images.zero_()
    assert load(parquet_folder).splits["test"].images.any()


def test_a_cache_that_cannot_be_written_is_an_error(parquet_folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DELTAFL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DeltaflError, match=r"cache folder .* cannot be written.*DELTAFL_CACHE"):
        load(parquet_folder)


def test_a_full_disk_is_an_error(parquet_folder, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeltaflError, match="No space left on device"):
        load(parquet_folder)
    assert not any(len(path.name) == 64 for path in (tmp_path / "cache").iterdir())


def test_a_source_that_cannot_be_read_is_not_blamed_on_the_cache(parquet_folder, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hashlib.file_digest", denied)
    with pytest.raises(DeltaflError, match=r'test\.parquet" cannot be read: Permission denied'):
        load(parquet_folder)
