"""The ImageNet weights that a package ships."""

import torch
from sklearn.datasets import load_sample_images

from models.config import Transform
from models.inputs.image import evaluation_image, normalize
from models.sources.efficientnet import MEAN, STD, Renormalized, lite0
from tiny import png

PALACE, DAISY = 698, 985
"""ImageNet's numbers of what scikit-learn's two photographs show: a Chinese palace, and a flower."""


def test_it_knows_photographs() -> None:
    transform = Transform()
    images = [evaluation_image(png(pixels), transform) for pixels in load_sample_images().images]
    batch = normalize(torch.stack([torch.from_numpy(image) for image in images]), transform, torch.device("cpu"))
    with torch.inference_mode():
        assert lite0().eval()(batch).argmax(1).tolist() == [PALACE, DAISY]


def test_with_other_classes_only_the_last_layer_is_new() -> None:
    own, other = lite0().state_dict(), lite0(num_classes=8).state_dict()
    assert own.keys() == other.keys()
    assert {name for name in own if own[name].shape != other[name].shape} == {"1._fc.weight", "1._fc.bias"}
    assert all(torch.equal(own[name], other[name]) for name in own if not name.startswith("1._fc."))


def test_its_own_input() -> None:
    pixels = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    usual = normalize(pixels, Transform(), torch.device("cpu"))
    own = normalize(pixels, Transform(mean=(MEAN,) * 3, std=(STD,) * 3), torch.device("cpu"))
    torch.testing.assert_close(Renormalized(MEAN, STD)(usual), own, rtol=0, atol=1e-5)
