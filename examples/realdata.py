"""Real images and ImageNet-pretrained networks from the folder that DELTAFL_REALDATA names, as `module:attr`.

deltafl federate --model examples.realdata:mobilenet --data examples.realdata:cifar100 ...
"""

import importlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from deltafl.errors import DeltaflError
from deltafl.tasks import ImageInput, Images, ImageTask, Task, load_task


def folder() -> Path:
    """The folder that holds data/ and weights/."""
    named = os.environ.get("DELTAFL_REALDATA")
    if not named:
        raise DeltaflError(
            "DELTAFL_REALDATA is not set; set it to the folder that holds data/ and weights/"
        )
    return Path(named)


def mobilenet(input_size: int = 64) -> nn.Module:
    """MobileNetV1 0.25 (arXiv 1704.04861), 0.2 M parameters without its classifier; batch norm is folded in."""
    models = _real_models()
    return _loaded(models.MobileNetV1(0.25), "mobilenet_v1_0.25_128_fp16", input_size)


def mobilenet_v2(input_size: int = 96) -> nn.Module:
    """MobileNetV2 1.0 (arXiv 1801.04381), 2.2 M parameters without its classifier; batch norm is folded in."""
    return _loaded(_real_models().MobileNetV2(), "mobilenet_v2_1.0_224_qat_fp16", input_size)


def _real_models() -> Any:
    weights = str(folder() / "weights")
    if weights not in sys.path:
        sys.path.append(weights)
    return importlib.import_module("real_models")


def _loaded(model: nn.Module, file: str, input_size: int) -> nn.Module:
    model = _real_models().load(model, f"{folder()}/weights/{file}.safetensors")
    model.input_size = input_size
    return model


def _task(name: str, inputs: ImageInput, seed: int) -> Task:
    return load_task(str(folder() / "data" / name), inputs, seed)


cifar100 = partial(_task, "cifar100")  # 200 training images of each class
dtd = partial(_task, "dtd")
eurosat = partial(_task, "eurosat")
fashion_mnist = partial(_task, "fashion_mnist")
gtsrb = partial(_task, "gtsrb")
mnist = partial(_task, "mnist")


def fashion_mnist_inverted(inputs: ImageInput, seed: int) -> Task:
    """Fashion-MNIST, bright and dark exchanged."""
    task = fashion_mnist(inputs, seed)
    assert isinstance(task, ImageTask)
    splits = {name: Images(255 - part.images, part.labels) for name, part in task.splits.items()}
    return ImageTask("fashion_mnist_inverted", splits, task.class_names)
