"""The settings of data: where they are, which part is used, and how a model trains on them."""

from typing import Annotated, Literal

from pydantic import Field

from deltafl.recipes import Incidental, Recipe

Augmentation = Literal["none", "flip", "crop_flip"]
Score = Literal["likelihood", "exact", "choice", "pass@1", "ifeval"]


class ImageSource(Recipe):
    """Which data, and what of a table is image and class."""

    data: str = Field(
        description="a folder, the name of a task (cifar100), digits:VARIANT, hub:OWNER/NAME, "
        "a file or folder of text, lines:FOLDER, or your own function MODULE:ATTR"
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


class TextSource(Recipe):
    """What of a table is text, and what it is judged by; None: what the catalogue says of the task,
    else the default.
    """

    prompt: str | None = Field(
        None,
        description="of text: the column of what is asked, or a template of columns, as "
        "'{question} {hint}' (default: prompt)",
    )
    response: str | None = Field(
        None, description="the column of the answer, or a template (default: response)"
    )
    messages: str | None = Field(
        None,
        description="instead of both the column of conversations, lists of {role, content}, of "
        "which the last answer counts (default: messages, where there is no prompt)",
    )
    choices: str | None = Field(
        None,
        description="the column of the answers to choose from; the response is one of them, or its "
        "number from 0",
    )
    groups: str | None = Field(
        None, description="the column whose values shards go by, as an author or a source"
    )
    template: Literal["auto", "chat", "plain"] | None = Field(
        None,
        description="the tokenizer's chat template, or prompt, newline, response (default: auto, "
        "the chat template where there is one)",
    )
    max_length: int | None = Field(
        None, ge=2, description="tokens of an example, at most (default: what the model takes)"
    )
    score: Score | None = Field(
        None,
        description="what text is judged by: the answer's mean log-likelihood, exact match of the "
        "final number or \\boxed{}, the likeliest of the choices, a program that passes its tests, "
        "or instructions followed (default: likelihood)",
    )
    program: str | None = Field(
        None,
        description="the program of pass@1, a template of columns in which {answer} is the code "
        "that the model wrote",
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="tokens that a model writes to be judged, at most (default: 256)"
    )
    allow_code_execution: Annotated[bool, Incidental] = Field(
        False, description="run the programs that a model writes, each confined, for pass@1"
    )


class DataSource(TextSource, ImageSource):
    """Which data: what they are, and which of their columns."""


class DataRecipe(DataSource):
    """Where the data of a task are, and which part of them is used; `load_task` reads it.

    `data` is, in this order of precedence:

    - `hub:owner/name[:config]`, a data set of the Hugging Face hub;
    - `parquet:PATH` or `folder:PATH`, the same as PATH, for names that look like something else,
      and
      `lines:PATH`, a folder with lines of plain text, `train*.txt` and `test*.txt`;
    - `digits` or `digits:VARIANT`;
    - PATH, a folder with `train*.parquet` and `test*.parquet`, with `train/CLASS/*.png` and
      `test/CLASS/*.png`, or with lines of text; `PATH/NAME` takes `NAME_train.parquet`,
      `NAME_test.parquet` and `NAME_classes.json` out of a folder of many; for text the files are
      also .jsonl or .json, and `PATH/NAME.jsonl`, or PATH itself, may be the only one;
    - the name of a task in catalogue.yaml or text_catalogue.yaml, such as `cifar100`: its hub set;
    - `module:attr`, a function `(inputs, seed) -> Task` importable from the working directory.

    With `data_dir` a task by name is `data_dir/NAME`, a folder of Parquet files or images, or
    `data_dir/NAME_train.parquet` and the like. That goes before a folder of that name in the
    working directory; what is not a name is then a mistake.
    """

    data_dir: str | None = Field(
        None, description="the folder that holds tasks by name; without it they come from the hub"
    )
    val_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="the part of train that is held out for validation where the data have no such "
        "split, at most 5000 examples (default: 0.1 of images, 0.05 of text)",
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
