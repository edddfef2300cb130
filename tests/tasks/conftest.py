from pathlib import Path

import numpy as np
import pytest
from dataset_files import picture, png, write_parquet


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAFL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def parquet_folder(tmp_path) -> Path:
    """40 + 12 pictures of four classes: picture i of train is flat grey i, of test 100 + i, class i modulo 4."""
    folder = tmp_path / "set"
    for name, first, count in (("train", 0, 40), ("test", 100, 12)):
        pictures = [png(picture(first + i)) for i in range(count)]
        labels, names = np.arange(count) % 4, ["ant", "bee", "cat", "dog"]
        write_parquet(folder / f"{name}.parquet", pictures, labels, names=names)
    return folder


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Six training and two test pictures of "left" (grey below 100) and "right" (from 100), and a stray text file."""
    folder = tmp_path / "pictures"
    for split, count in (("train", 6), ("test", 2)):
        for start, name in ((0, "left"), (100, "right")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                picture(start + i).save(folder / split / name / f"{i}.png")
    (folder / "train" / "left" / "notes.txt").write_text("no picture")
    return folder
