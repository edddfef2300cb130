"""Small data sets in the real formats."""

import io
import json
from pathlib import Path

from PIL import Image

from deltafl.tasks import DataRecipe, ImageInput, ImageTask, load_task


def load(data, size=8, channels=3, seed=0, **settings) -> ImageTask:
    """The images that `data` names, in a size."""
    recipe = DataRecipe.of(data=str(data), **settings)
    task = load_task(recipe, ImageInput(size, channels), seed)
    assert isinstance(task, ImageTask)
    return task


def sizes(task) -> list[int]:
    """Examples in train, val and test."""
    return [task.size(split) for split in ("train", "val", "test")]


def picture(number: int, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Image.Image:
    """A picture whose every pixel is `number` (modulo 256)."""
    return Image.new(mode, size, number % 256 if mode == "L" else (number % 256,) * 3)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, images, labels, image="image", label="label", names=None) -> Path:
    """A file as `datasets` writes it: image struct{bytes, path}, label a ClassLabel if `names`, else int64 or bool."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [content and {"bytes": content, "path": f"{i}.png"} for i, content in enumerate(images)]
    dtype = "bool" if isinstance(labels[0], bool) else "int64"
    kind = {"_type": "ClassLabel", "names": names} if names else {"_type": "Value", "dtype": dtype}
    features = {"info": {"features": {image: {"_type": "Image"}, label: kind}}}
    pictures = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({image: pictures, label: pa.array(labels)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    return path
