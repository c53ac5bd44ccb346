"""`tophat export`: the file against the network, by ONNX's own runtime, on real images."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import tiny
from cluster import storage
from cluster.errors import InputError, ModelError, StageError
from models.architectures import build
from models.config import ModelConfig, Transform
from models.directory import load, save
from models.export import OPSET, TOLERANCE, export
from models.inputs.image import evaluation_image, normalize

NAMES = ["zero", "one", 'a <b>"name"</b> é']


class Owned(nn.Module):
    """A user's network: takes a pooled image, and has a layer that names its classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Undecided(Owned):
    """One that looks at its pixels to choose what it does, as no graph can."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Moody(Owned):
    """One that says something else while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (torch.arange(3) if torch.compiler.is_exporting() else 0)


def saved(uri: str, architecture: str, *, trained: bool = False, **options: Any) -> str:
    """A model directory of random weights, or of a few steps on real digits, which leaves batch normalizations of any kind."""
    torch.manual_seed(1)
    transform = Transform(size=28, resize=32, mean=(0.1, 0.2, 0.3), std=(0.3, 0.5, 0.7))
    config = ModelConfig(architecture=architecture, options=options, transform=transform)
    model = build(config, len(NAMES))
    if trained:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(10):
            numbers = torch.arange(24) % 3
            data = [tiny.digits()[tiny.CLASSES[n]][step * 24 + i] for i, n in enumerate(numbers.tolist())]
            images = torch.from_numpy(np.stack([evaluation_image(one, transform) for one in data]))
            loss = nn.functional.cross_entropy(model(normalize(images, transform, torch.device("cpu"))), numbers)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    save(uri, model.eval(), config=config, class_names=NAMES, metrics={}, provenance={})
    return uri


def real_images(transform: Transform) -> np.ndarray[Any, np.dtype[np.uint8]]:
    digits = [tiny.digits()[name][number] for name in tiny.CLASSES for number in range(3)]
    photographs = [tiny.png(photograph[:, 100:]) for photograph in load_sample_images().images]
    return np.stack([evaluation_image(data, transform) for data in digits + photographs])


@pytest.mark.parametrize(
    ("architecture", "trained", "options"),
    [
        ("resnet8", True, {"width": 8}),
        ("resnet18", False, {"width_per_group": 64}),
        ("test_export:Owned", False, {}),
    ],
)
def test_a_file_says_what_the_network_says(
    tmp_path: Path, architecture: str, trained: bool, options: dict[str, Any]
) -> None:
    model = saved(f"{tmp_path}/model", architecture, trained=trained, **options)
    made = export(model, f"{tmp_path}/out/model.onnx")
    assert (made.images, made.size, made.classes) == (8, 28, 3)
    assert 0 <= made.difference <= TOLERANCE
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]
    content = (tmp_path / "out" / "model.onnx").read_bytes()
    assert len(content) == made.bytes
    assert str(Path(__file__).parent.parent).encode() not in content

    loaded = load(model)
    images = real_images(loaded.config.transform)
    with torch.inference_mode():
        logits = loaded.model(normalize(torch.from_numpy(images), loaded.config.transform, torch.device("cpu")))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for count in (1, 2, len(images)):
        found, scores = session.run(None, {"images": images[:count]})
        assert np.allclose(found, logits[:count], atol=1e-4)
        assert np.allclose(scores, logits[:count].softmax(1), atol=1e-5)
    assert len(np.unique(logits.argmax(1))) > 1 or not trained  # it has learned something

    parsed = onnx.load_from_string(content)
    assert [(one.domain, one.version) for one in parsed.opset_import if not one.domain] == [("", OPSET)]
    properties = {one.key: one.value for one in parsed.metadata_props}
    assert json.loads(properties.pop("class_names")) == NAMES
    assert properties.items() >= {"architecture": architecture, "size": "28", "resize": "32"}.items()
    assert not properties.keys() & {"mean", "std", "crop", "flip"}


def test_the_same_model_makes_the_same_bytes(tmp_path: Path) -> None:
    model = saved(f"{tmp_path}/model", "test_export:Owned")
    for name in ("a", "b"):
        export(model, f"{tmp_path}/{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_network_that_no_graph_can_tell_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = saved(f"{tmp_path}/model", "test_export:Undecided")
    with pytest.raises(ModelError, match="cannot be exported") as raised:
        export(model, f"{tmp_path}/out/a.onnx")
    assert len(str(raised.value)) < 700
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")
    assert not list((tmp_path / "out").glob("*"))


def test_a_file_that_says_something_else_is_not_left(tmp_path: Path) -> None:
    model = saved(f"{tmp_path}/model", "test_export:Moody")
    with pytest.raises(StageError, match="something else"):
        export(model, f"{tmp_path}/out/a.onnx")
    assert not list((tmp_path / "out").glob("*"))


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"onnxscript.*pip install 'tophat\[onnx\]'"):
        export(f"{tmp_path}/model", f"{tmp_path}/a.onnx")


def test_without_a_runtime_it_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    made = export(saved(f"{tmp_path}/model", "test_export:Owned"), f"{tmp_path}/a.onnx")
    assert made.images == 0
    assert (tmp_path / "a.onnx").exists()


def test_nothing_is_written_over(tmp_path: Path, tophat: Callable[..., tuple[int, str, str]]) -> None:
    model, to = saved(f"{tmp_path}/model", "test_export:Owned"), tmp_path / "a.onnx"
    to.write_text("mine")
    code, _, errors = tophat("export", model, "--onnx", str(to))
    assert (code, errors) == (
        2, f"error: --onnx = '{to}': exists already; give another one, or --force to write over it\n"
    )  # fmt: skip
    assert to.read_text() == "mine"
    assert tophat("export", model, "--onnx", str(to), "--force")[0] == 0
    onnx.checker.check_model(onnx.load_from_string(to.read_bytes()))
    (tmp_path / "b.onnx").mkdir()
    code, _, errors = tophat("export", model, "--onnx", f"{tmp_path}/b.onnx")
    assert (code, errors) == (2, f"error: --onnx = '{tmp_path}/b.onnx': is a folder; give a file\n")


def test_the_command(place: str, tophat: Callable[..., tuple[int, str, str]]) -> None:
    model = saved(storage.join(place, "model"), "test_export:Owned")
    to = storage.join(place, "out", "owned.onnx")
    code, printed, errors = tophat("export", model, "--onnx", to)
    assert (code, errors) == (0, "")
    lines = printed.splitlines()
    assert lines[0].startswith(f"onnx: {to} (")
    assert lines[1] == "input: images, uint8 [batch, 3, 28, 28], RGB"
    assert lines[3].startswith("checked: on 8 real images, at most ")
    assert len(lines) == 4
    onnx.checker.check_model(onnx.load_from_string(storage.read_bytes(to)))


@pytest.mark.parametrize(
    ("model", "to", "told"),
    [
        ("nowhere", "a.onnx", "MODEL = '{}/nowhere': has no model.json"),
        ("nowhere", "a.pt", "--onnx = '{}/a.pt': must be the name of a file that ends in .onnx"),
    ],
)
def test_mistakes(tmp_path: Path, tophat: Callable[..., tuple[int, str, str]], model: str, to: str, told: str) -> None:
    code, _, errors = tophat("export", f"{tmp_path}/{model}", "--onnx", f"{tmp_path}/{to}")
    assert code == 2
    assert errors.startswith(f"error: {told.format(tmp_path)}")
    assert len(errors.splitlines()) == 1
