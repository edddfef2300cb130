"""Real images and ImageNet-pretrained networks from the folder that DELTAFL_REALDATA names, as `module:attr`.

deltafl federate --model examples.realdata:mobilenet --data examples.realdata:cifar100 ...
"""

import os
import sys
from pathlib import Path

from torch import nn

from deltafl.datasets import Task, load_task
from deltafl.errors import DeltaflError


def folder() -> Path:
    """The folder that holds data/ and weights/."""
    named = os.environ.get("DELTAFL_REALDATA")
    if not named:
        raise DeltaflError("DELTAFL_REALDATA is not set; set it to the folder that holds data/ and weights/")
    return Path(named)


def mobilenet(input_size: int = 64) -> nn.Module:
    """MobileNetV1 0.25 (arXiv 1704.04861), 0.2 M parameters without its classifier; batch norm is folded in."""
    weights = str(folder() / "weights")
    if weights not in sys.path:
        sys.path.append(weights)
    import real_models

    model = real_models.load(real_models.MobileNetV1(0.25), f"{weights}/mobilenet_v1_0.25_128_fp16.safetensors")
    model.input_size = input_size
    return model


def cifar100(image_size: int, channels: int, seed: int) -> Task:
    """CIFAR-100, 200 training images of each class."""
    return load_task(str(folder() / "data" / "cifar100"), image_size=image_size, channels=channels, seed=seed)
