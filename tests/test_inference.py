"""The fast predictor against the plain network: the same classes, the same scores."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from cluster.errors import ModelError
from models.architectures import build
from models.card import WEIGHTS, read_card, read_weights
from models.config import ModelConfig, Transform, Views
from models.directory import load, save
from models.inference import Inference, Prediction, Predictor, _even, _few_sizes, folded
from models.inputs.image import normalize

CLASSES = 20
SMALL = Transform(size=64, resize=64)


class Branching(nn.Module):
    """A network that cannot be traced: what it does depends on what it sees."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        if x.mean() > 0:
            x = x.relu()
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Alternating(nn.Module):
    """A network whose trace is another one: a convolution that is used twice, and normalized once."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.first(self.first(x).relu())).mean(dim=(2, 3)))  # type: ignore[no-any-return]


def saved(folder: Path, config: ModelConfig) -> str:
    """A model directory with fresh weights, batch normalizations that have seen data, and outputs of some size."""
    torch.manual_seed(1)
    model = build(config, CLASSES).train()
    noise = torch.randn(16, 3, config.transform.size, config.transform.size)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.5
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
        for _ in range(2):
            model(2 * noise + 0.5)
    uri = str(folder / "model")
    save(uri, model, config=config, class_names=[str(i) for i in range(CLASSES)], metrics={}, provenance={})
    return uri


def pictures(count: int, side: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth random images, uint8 [count, 3, side, side]."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (255 * smooth).to(torch.uint8).numpy()


def predictor(uri: str, **how: Any) -> Predictor:
    return Predictor(uri, Inference(**{"classes_per_image": 5, **how}))


def predict(uri: str, images: NDArray[np.uint8], **how: Any) -> Prediction:
    return predictor(uri, **how)(images)


def plain_logits(uri: str, images: NDArray[np.uint8]) -> Tensor:
    """As a user would: the saved network in evaluation mode, on a contiguous batch."""
    loaded = load(uri)
    batch = normalize(torch.from_numpy(images), loaded.config.transform, torch.device("cpu")).contiguous()
    with torch.inference_mode():
        return loaded.model(batch)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(architecture="resnet18", transform=SMALL),
        ModelConfig(architecture="resnext50_32x4d", transform=SMALL),
        ModelConfig(architecture="resnet20", options={"width": 8}, transform=SMALL),
    ],
    ids=lambda config: config.architecture,
)
def test_predictions_are_those_of_the_plain_network(tmp_path: Path, config: ModelConfig) -> None:
    uri = saved(tmp_path, config)
    plain = load(uri).model
    assert folded(plain, 64) is not plain
    images = pictures(21, 64)
    expected = plain_logits(uri, images).softmax(1).topk(5, dim=1)
    found = predict(uri, images, batch_size=8)
    np.testing.assert_array_equal(found.classes, expected.indices.numpy())
    np.testing.assert_allclose(found.scores, expected.values.numpy(), atol=1e-5)
    assert found.scores.dtype == np.float32
    assert found.scores[:, 0].max() > 1.5 / CLASSES  # the test could fail: some class stands out


@pytest.mark.parametrize("name", ["Branching", "Alternating"])
def test_a_network_that_folding_would_change_is_left_as_it_is(tmp_path: Path, name: str) -> None:
    uri = saved(tmp_path, ModelConfig(architecture=f"test_inference:{name}", transform=SMALL))
    plain = load(uri).model
    assert folded(plain, 64) is plain
    images = pictures(5, 64)
    expected = plain_logits(uri, images).softmax(1).topk(5, dim=1)
    found = predict(uri, images)
    np.testing.assert_array_equal(found.classes, expected.indices.numpy())
    np.testing.assert_allclose(found.scores, expected.values.numpy(), atol=1e-5)


def test_weights_that_were_read_before_are_not_read_again(tmp_path: Path) -> None:
    uri = saved(tmp_path, ModelConfig(architecture="resnet8", options={"width": 4}, transform=SMALL))
    content = read_weights(uri, read_card(uri))
    expected = predict(uri, pictures(3, 64))
    (tmp_path / "model" / WEIGHTS).unlink()
    held = Predictor(uri, Inference(classes_per_image=5), content)
    images = pictures(3, 64)
    images.flags.writeable = False  # as in Ray's object store
    np.testing.assert_array_equal(held(images).scores, expected.scores)
    assert held(pictures(0, 64)).scores.shape == (0, 5)


@pytest.mark.parametrize(("views", "count"), [("center", 1), ("mirrored", 2), ("five", 5), ("ten", 10)])
@pytest.mark.parametrize("logits", [False, True])
def test_views_are_averaged(tmp_path: Path, views: Views, count: int, logits: bool) -> None:
    transform = Transform(size=48, resize=64)
    uri = saved(tmp_path, ModelConfig(architecture="resnet8", options={"width": 4}, transform=transform))
    side = transform.seen_by(views).size
    images = pictures(6, side)
    offsets = [(8, 8), (0, 0), (0, 16), (16, 0), (16, 16)] if side == 64 else [(0, 0)]
    crops = [images[:, :, top : top + 48, left : left + 48] for top, left in offsets]
    crops += [np.ascontiguousarray(crop[..., ::-1]) for crop in crops] if count in (2, 10) else []
    assert len(crops) == count
    outputs = [plain_logits(uri, crop) for crop in crops]
    mean = torch.stack([one if logits else one.softmax(1) for one in outputs]).mean(0)
    expected = mean.topk(5, dim=1)
    found = predict(uri, images, views=views, logits=logits, features=True)
    np.testing.assert_array_equal(found.classes, expected.indices.numpy())
    np.testing.assert_allclose(found.scores, expected.values.numpy(), atol=1e-5, rtol=1e-5)
    alone = predict(uri, np.ascontiguousarray(crops[0]), features=True)
    assert found.features is not None
    assert alone.features is not None
    np.testing.assert_array_equal(found.features, alone.features)


def test_bfloat16_is_close_and_another(tmp_path: Path) -> None:
    uri = saved(tmp_path, ModelConfig(architecture="resnet8", options={"width": 4}, transform=SMALL))
    exact, short = (predict(uri, pictures(8, 64), precision=name).scores for name in ("float32", "bfloat16"))
    assert 0 < np.abs(exact - short).max() < 0.05


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_kernels_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch, of several and of a part of one, with features; in another thread than the one that loads, as in an actor."""
    import torch._inductor.config
    import torch._inductor.freezing as freezing

    frozen: list[bool] = []
    freeze = freezing.freeze

    def seen(*given: Any, **more: Any) -> Any:
        frozen.append(True)
        return freeze(*given, **more)

    monkeypatch.setattr(freezing, "freeze", seen)
    uri = saved(tmp_path, ModelConfig(architecture="resnet8", options={"width": 4}, transform=SMALL))
    loaded = predictor(uri, batch_size=8, compile=True, features=True)
    pool = ThreadPoolExecutor(1)
    for count in (8, 21, 1):
        images = pictures(count, 64, seed=count)
        expected = plain_logits(uri, images).softmax(1).topk(5, dim=1)
        eager = predict(uri, images, features=True)
        found = pool.submit(loaded, images).result()
        np.testing.assert_array_equal(found.classes, expected.indices.numpy())
        np.testing.assert_allclose(found.scores, expected.values.numpy(), atol=1e-5)
        assert found.features is not None
        assert eager.features is not None
        np.testing.assert_allclose(found.features, eager.features, rtol=2e-3, atol=1e-5)
    pool.shutdown()
    assert frozen == [True]  # once, for one size of batch
    assert not torch._inductor.config.freezing


@pytest.mark.parametrize("outputs", [(7, 3, 19, 0, 11, 4), tuple(range(CLASSES))[::-1]], ids=["fewer", "another order"])
@pytest.mark.parametrize("logits", [False, True])
def test_outputs_that_count_are_ranked_after_the_softmax_of_all(
    tmp_path: Path, outputs: tuple[int, ...], logits: bool
) -> None:
    uri = saved(tmp_path, ModelConfig(architecture="resnet8", options={"width": 4}, transform=SMALL))
    images = pictures(21, 64)
    plain = plain_logits(uri, images)
    every = plain if logits else plain.softmax(1)
    expected = torch.stack([every[:, output] for output in outputs], dim=1).topk(5, dim=1)
    found = predict(uri, images, batch_size=8, logits=logits, outputs=outputs)
    np.testing.assert_array_equal(found.classes, expected.indices.numpy())
    np.testing.assert_allclose(found.scores, expected.values.numpy(), atol=1e-5, rtol=1e-5)
    assert found.classes.max() >= 5  # the best are not the first


def test_outputs_that_the_network_does_not_have_are_refused(tmp_path: Path) -> None:
    uri = saved(tmp_path, ModelConfig(architecture="resnet8", options={"width": 4}, transform=SMALL))
    with pytest.raises(ModelError, match=r"^model = '.*': has 20 outputs, and output 20 is wanted; name outputs that"):
        predictor(uri, outputs=(20, 3))


@given(st.integers(1, 8192))
def test_batches_of_a_gpu_have_few_sizes(batch_size: int) -> None:
    sizes = _few_sizes(batch_size)
    assert sizes == sorted(set(sizes))
    assert sizes[0] >= 1
    assert sizes[-1] == batch_size
    assert len(sizes) <= 4


@given(st.integers(1, 5000), st.integers(1, 512))
def test_batches_are_even(images: int, batch_size: int) -> None:
    step = _even(images, batch_size)
    batches = -(-images // step)
    assert step <= batch_size
    assert batches == -(-images // batch_size)  # no more of them
    assert step - (images - (batches - 1) * step) < batches  # the last one is hardly smaller
