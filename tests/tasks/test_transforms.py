import pytest
import torch

from deltafl.tasks.images import random_crop, random_flip


@pytest.fixture
def images():
    return torch.randint(
        256, (50, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_every_crop_is_a_window_of_the_padded_image(images):
    cropped = random_crop(images, 2, torch.Generator().manual_seed(1))
    assert cropped.dtype == images.dtype
    padded = torch.nn.functional.pad(images, [2] * 4)
    places = set()
    for image, crop in zip(padded, cropped, strict=True):
        hits = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(image[:, y : y + 6, x : x + 6], crop)
        ]
        assert hits
        places.update(hits)
    assert len(places) > 12  # of 25; fifty uniform draws reach about 22


def test_flip_mirrors_about_half(images):
    flipped = random_flip(images, torch.Generator().manual_seed(1))
    mirrored = [torch.equal(f, i.flip(-1)) for f, i in zip(flipped, images, strict=True)]
    kept = [torch.equal(f, i) for f, i in zip(flipped, images, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 10 < sum(mirrored) < 40


@pytest.mark.parametrize("change", [lambda i, g: random_crop(i, 2, g), random_flip])
def test_changes_follow_the_generator_and_leave_the_argument_alone(change, images):
    before = images.clone()
    first, again = (change(images, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, change(images, torch.Generator().manual_seed(6)))
    assert torch.equal(images, before)
