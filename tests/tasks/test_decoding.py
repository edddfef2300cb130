import numpy as np
import pytest
from dataset_files import picture, png
from datasets import Dataset
from PIL import Image

from deltafl.errors import DeltaflError
from deltafl.tasks import ImageInput
from deltafl.tasks.tables import BATCH, RawSplit, decoded


def cell(content):
    return {"bytes": content, "path": None}


def split(contents):
    column = Dataset.from_dict({"image": [cell(content) for content in contents]})["image"]
    return RawSplit(np.zeros(len(contents), np.int64), column, "some.parquet")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_and_colour_become_the_channels_asked_for(channels, mode):
    pixels = ImageInput(8, channels).decode(cell(png(picture(77, mode=mode))))
    assert pixels.shape == (channels, 8, 8)
    assert pixels.dtype == np.uint8
    assert (pixels == 77).all()


def test_crop_agrees_with_the_clip_processor():
    from transformers.models.clip import CLIPImageProcessorPil

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=16, do_rescale=False, do_normalize=False
    )
    expected = np.asarray(processor(image)["pixel_values"][0])
    assert np.array_equal(ImageInput(16).decode(np.asarray(image)), expected)


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn
    pixels = np.zeros((8, 8), np.uint8)
    pixels[0] = 255
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = {"bytes": None, "path": str(tmp_path / "turned.png")}
    assert (ImageInput(8, 1).decode(turned)[0, -1] == 255).all()


def test_batches_keep_the_order_of_rows():
    count = 2 * BATCH + 3
    rows = np.arange(count - 1, -1, -1)
    contents = [png(picture(row // 5, (4, 4))) for row in range(count)]
    batches = list(decoded(split(contents), rows, ImageInput(4, 1)))
    assert [len(batch) for batch in batches] == [BATCH, BATCH, 3]
    assert np.array_equal(np.concatenate(batches)[:, 0, 0, 0], rows // 5 % 256)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "bad",
    [b"", b"no image", png(NOISE)[:900], png(Image.new("I;16", (4, 4)))],
    ids=["empty", "text", "truncated", "16 bit"],
)
def test_an_undecodable_image_is_named_by_row_and_file(bad):
    good = png(picture(1))
    with pytest.raises(DeltaflError, match=r"row 1 of some\.parquet is not an 8-bit image"):
        list(decoded(split([good, bad, good]), np.arange(3), ImageInput(4)))
