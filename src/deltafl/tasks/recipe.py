"""The settings of data: where they are, which part is used, and how a model trains on them."""

from typing import Literal

from pydantic import Field

from deltafl.recipes import Recipe

Augmentation = Literal["none", "flip", "crop_flip"]


class DataSource(Recipe):
    """Which data: what they are, and which of their columns."""

    data: str = Field(
        description="a folder, the name of a task (cifar100), digits:VARIANT, hub:OWNER/NAME, "
        "lines:FOLDER for text, or your own function MODULE:ATTR"
    )
    image_column: str | None = Field(
        None,
        description="the column of images, of Parquet files and hub sets "
        "(default: image, else img)",
    )
    label_column: str | None = Field(
        None, description="the column of class numbers (default: label, else fine_label)"
    )
    revision: str | None = Field(None, description="the version of a hub data set")

    def columns(self) -> dict[str, tuple[str, ...]]:
        """Names for the columns "image" and "label"; the first that a table has counts."""
        return {
            "image": (self.image_column,) if self.image_column else ("image", "img"),
            "label": (self.label_column,) if self.label_column else ("label", "fine_label"),
        }


class DataRecipe(DataSource):
    """Where the data of a task are, and which part of them is used; `load_task` reads it.

    `data` is, in this order of precedence:

    - `hub:owner/name[:config]`, a data set of the Hugging Face hub;
    - `parquet:PATH` or `folder:PATH`, the same as PATH, for names that look like something else,
      and
      `lines:PATH`, a folder with lines of plain text, `train*.txt` and `test*.txt`;
    - `harness:NAME` or `harness:FILE.yaml`, a task of lm-eval, which judges and trains nothing;
    - `digits` or `digits:VARIANT`;
    - PATH, a folder with `train*.parquet` and `test*.parquet`, with `train/CLASS/*.png` and
      `test/CLASS/*.png`, or with lines of text; `PATH/NAME` takes `NAME_train.parquet`,
      `NAME_test.parquet` and `NAME_classes.json` out of a folder of many;
    - the name of a task in catalogue.yaml, such as `cifar100`: its hub set;
    - `module:attr`, a function `(inputs, seed) -> Task` importable from the working directory.

    With `data_dir` a task by name is `data_dir/NAME`, a folder of Parquet files or images, or
    `data_dir/NAME_train.parquet` and the like. That goes before a folder of that name in the
    working directory; what is not a name is then a mistake.
    """

    data_dir: str | None = Field(
        None, description="the folder that holds tasks by name; without it they come from the hub"
    )
    val_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="the part of train that is held out for validation where the data have no such "
        "split, at most 5000 examples",
    )
    limit: int | None = Field(
        None, ge=1, description="keep at most so many examples of each split, of all classes"
    )


class TrainingDataRecipe(DataRecipe):
    """Data, and how a model sees them while it trains."""

    augment: Augmentation = Field(
        "none", description="of training images: none, flip or crop_flip (shifted by an eighth)"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the training loss")
