"""Real images and ImageNet-pretrained networks from the folder that DELTAFL_REALDATA names, as `module:attr`.

deltafl federate --model examples.realdata:mobilenet --data examples.realdata:cifar100 ...
"""

import os
import sys
from functools import partial
from pathlib import Path

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
    weights = str(folder() / "weights")
    if weights not in sys.path:
        sys.path.append(weights)
    import real_models

    model = real_models.load(
        real_models.MobileNetV1(0.25), f"{weights}/mobilenet_v1_0.25_128_fp16.safetensors"
    )
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
