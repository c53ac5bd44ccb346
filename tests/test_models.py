"""Architectures against Table 3 and torchvision, and model directories, whole and broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from cluster import storage
from cluster.errors import ModelError, StorageError
from models import directory as checkpoint
from models.architectures import SmallResNet, build
from models.card import read_card
from models.config import ARCHITECTURES, ModelConfig, Transform
from models.evaluation import Evaluation, evaluate_batches
from models.inputs.image import normalize

TINY = ModelConfig(architecture="resnet8", options={"width": 4}, transform=Transform(size=16, resize=16))
CLASSES = ["cat", "dog", "a <b>name</b>"]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet18", 11.7),  # the table says 8.6, which no ResNet-18 has
        ("resnet50", 25),
        ("resnext50_32x4d", 25),
        ("resnext101_32x4d", 43),
        ("resnext101_32x8d", 88),
        ("resnext101_32x16d", 193),
        ("resnext101_32x48d", 829),
    ],
)
def test_parameters_are_those_of_table_3(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = build(ModelConfig(architecture=name), 1000)
    assert parameters(model) / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "resnext101_32x8d"])
def test_large_networks_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        own = build(ModelConfig(architecture=name), 1000).state_dict()
        reference = getattr(torchvision.models, name)().state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in reference.items()}


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_small_networks_have_he_et_als_size(depth: int, millions: float) -> None:
    model = SmallResNet(depth, 10)
    assert parameters(model) / 1e6 == pytest.approx(millions, rel=0.02)
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    shortcuts = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(weighted) - len(shortcuts) == depth


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if "101" not in n])
def test_every_network_gives_a_logit_per_class(name: str) -> None:
    model = build(ModelConfig(architecture=name), 7).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def a_factory(num_classes: int, width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 16), nn.Flatten(), nn.Linear(width, num_classes))


def a_fixed_factory(num_classes: int) -> nn.Module:
    return a_factory(10)


def not_a_network(num_classes: int) -> int:
    return num_classes


def a_large_factory(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 99), nn.Flatten(), nn.Linear(4, num_classes))


@pytest.mark.parametrize(
    ("name", "near"), [("resnet5O", "resnet56, resnet50"), ("vgg", "resnet18, resnet50"), ("a b:c", "")]
)
def test_an_unknown_name_is_refused_with_near_ones(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"is no known architecture; use one of {near}"):
        ModelConfig(architecture=name)


def test_a_factory_is_called_by_its_import_path() -> None:
    config = TINY.model_copy(update={"architecture": f"{__name__}:a_factory", "options": {"width": 5}})
    model = build(config, 3)
    assert isinstance(model, nn.Sequential)
    assert model[0].out_channels == 5
    assert model.training


@pytest.mark.parametrize(
    ("architecture", "options", "said"),
    [
        ("resnet8", {"depth": 3}, "options {'depth': 3}"),
        ("resnet18", {"wide": 3}, "unexpected keyword argument 'wide'"),
        ("no_such_package:model", {}, "could not be imported (ModuleNotFoundError"),
        ("torchvision.models:resnet5O", {}, "could not be imported (AttributeError"),
        ("torch:__version__", {}, "cannot be called"),
        (f"{__name__}:not_a_network", {}, "returned a int; return a torch.nn.Module"),
        (f"{__name__}:a_fixed_factory", {}, "returned [1, 10] for one image of 3 classes; return logits [N, 3]"),
        (f"{__name__}:a_large_factory", {}, "does not take a batch of 3 x 16 x 16"),
    ],
)
def test_an_architecture_that_cannot_be_used_is_one_line(architecture: str, options: dict[str, int], said: str) -> None:
    config = ModelConfig(architecture=architecture, options={**options}, transform=TINY.transform)
    with pytest.raises(ModelError) as caught:
        build(config, 3)
    message = str(caught.value)
    assert said in message
    assert message.startswith("architecture = ")
    assert "\n" not in message


def trained(config: ModelConfig = TINY, classes: int = 3) -> nn.Module:
    """A network whose batch statistics are not the initial ones."""
    torch.manual_seed(5)
    model = build(config, classes)
    model(torch.randn(8, 3, config.transform.size, config.transform.size))
    return model


def saved(uri: str, model: nn.Module | None = None) -> None:
    checkpoint.save(
        uri,
        model or trained(),
        config=TINY,
        class_names=CLASSES,
        metrics={"top1": 0.5, "loss": float("nan")},
        provenance={"run": "r", "seed": 3},
    )


def test_a_model_comes_back_as_it_was(place: str) -> None:
    model = trained()
    saved(place, model)
    loaded = checkpoint.load(place)
    assert (loaded.config, loaded.class_names, loaded.provenance) == (TINY, CLASSES, {"run": "r", "seed": 3})
    assert loaded.metrics == {"top1": 0.5, "loss": None}
    assert not loaded.model.training
    images = torch.randn(4, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(loaded.model(images), model.eval()(images))


def test_torchvision_loads_ours(tmp_path: Path) -> None:
    config = ModelConfig(architecture="resnet50")
    model = trained(ModelConfig(architecture="resnet50", transform=Transform(size=64, resize=64)), 1000)
    checkpoint.save(
        str(tmp_path), model, config=config, class_names=[str(i) for i in range(1000)], metrics={}, provenance={}
    )
    reference = torchvision.models.resnet50()
    reference.load_state_dict(load_file(tmp_path / "model.safetensors"))
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(reference.eval()(images), model.eval()(images))


def test_the_card_is_read_without_torch(tmp_path: Path) -> None:
    saved(str(tmp_path))
    code = (
        "import sys; from models.card import read_card; card = read_card(sys.argv[1]);"
        "print(card.model.architecture, len(card.class_names), 'torch' in sys.modules, 'ray' in sys.modules)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True, cwd=root
    )
    assert done.stdout == "resnet8 3 False False\n"


def test_configuration_and_driver_are_imported_without_torch() -> None:
    code = "import sys, models.config, models.training.launch; print('torch' in sys.modules, 'ray' in sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=root
    )
    assert done.stdout == "False False\n"


def refusal(uri: str) -> str:
    with pytest.raises(ModelError) as caught:
        checkpoint.load(uri)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_directory_without_a_card_is_no_model(place: str) -> None:
    assert "has no model.json; name a finished model directory" in refusal(place)
    saved(place)
    storage.delete_file(storage.join(place, "model.json"))
    assert "has no model.json" in refusal(place)


def test_broken_directories_are_refused_in_one_line(tmp_path: Path) -> None:
    uri = str(tmp_path)
    saved(uri)
    card, weights = tmp_path / "model.json", tmp_path / "model.safetensors"
    good_card, good_weights = card.read_bytes(), weights.read_bytes()

    flipped = bytearray(good_weights)
    flipped[-1] ^= 1
    weights.write_bytes(bytes(flipped))
    assert "whose hash is not its card's" in refusal(uri)
    weights.write_bytes(good_weights[:-1])
    assert f"of {len(good_weights) - 1} bytes where its card says {len(good_weights)}" in refusal(uri)
    weights.unlink()
    assert "has a model.json and no model.safetensors" in refusal(uri)
    weights.write_bytes(good_weights)

    card.write_bytes(b"{")
    assert "that is not JSON" in refusal(uri)
    card.write_bytes(b"\xff\xfe")
    assert "that is not JSON" in refusal(uri)
    for change, said in (
        ({"format": 2}, "bad format"),
        ({"class_names": []}, "bad class_names"),
        ({"class_names": ["only", "two"]}, "fc.bias is [3] and should be [2]"),
        ({"surprise": 1}, "bad surprise"),
    ):
        card.write_text(json.dumps(json.loads(good_card) | change))
        assert said in refusal(uri)
    other = json.loads(good_card)
    other["model"]["architecture"] = "resnet14"
    card.write_text(json.dumps(other))
    assert "weights that do not fit resnet14: layer1.1.bn1.bias is missing" in refusal(uri)
    card.write_bytes(good_card)
    assert checkpoint.load(uri).class_names == CLASSES
    assert read_card(uri).weights.size == len(good_weights)


@pytest.mark.parametrize("names", [[CLASSES[1]], CLASSES[::-1], [CLASSES[2], CLASSES[0]]])
def test_fine_tuning_takes_the_last_layer_of_classes_that_are_known(tmp_path: Path, names: list[str]) -> None:
    uri, source = str(tmp_path), trained()
    saved(uri, source)
    model = build(TINY, len(names))
    checkpoint.start_from(model, uri, names)
    images = torch.rand(4, 3, 16, 16)
    with torch.inference_mode():
        expected = source.eval()(images)[:, [CLASSES.index(name) for name in names]]
        assert torch.allclose(model.eval()(images), expected, atol=1e-6)


def test_fine_tuning_keeps_the_last_layer_only_for_the_same_classes(tmp_path: Path) -> None:
    uri = str(tmp_path)
    source = trained()
    saved(uri, source)
    same, fresh = build(TINY, 3), build(TINY, 5)
    before = fresh.state_dict()["fc.weight"].clone()
    checkpoint.start_from(same, uri, CLASSES)
    checkpoint.start_from(fresh, uri, ["a", "cat", "c", "d", "e"])
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in same.state_dict().items())
    for name, value in fresh.state_dict().items():
        expected = before if name == "fc.weight" else None if name == "fc.bias" else source.state_dict()[name]
        assert expected is None or torch.equal(value, expected), name
    with pytest.raises(ModelError, match=r"initial = .* does not fit the network to train: layer1\.1"):
        checkpoint.start_from(build(TINY.model_copy(update={"architecture": "resnet14"}), 3), uri, CLASSES)


class Table(nn.Module):
    """Looks its logits up: an image's first pixel says which row."""

    def __init__(self, logits: Tensor, transform: Transform) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.marks = normalize(
            torch.arange(len(logits), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1),
            transform,
            torch.device("cpu"),
        )[:, 0, 0, 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[(x[:, :1, 0, 0] - self.marks).abs().argmin(1)]


@pytest.mark.parametrize("classes", [3, 8])
def test_evaluation_counts_and_adds_up(classes: int) -> None:
    logits = torch.randn(50, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % classes
    images = torch.arange(50, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    model = Table(logits, TINY.transform)
    whole = evaluate_batches(model, [(images, labels)], TINY.transform)
    parts = [
        evaluate_batches(model, [(images[a:b], labels[a:b])], TINY.transform)
        for a, b in ((0, 1), (1, 33), (33, 50), (50, 50))
    ]
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert (whole.images, whole.hits1, whole.hits5) == (50, int((ranks < 1).sum()), int((ranks < 5).sum()))
    assert whole.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    total = sum(parts, Evaluation())
    assert (total.images, total.hits1, total.hits5) == (whole.images, whole.hits1, whole.hits5)
    assert total.loss == pytest.approx(whole.loss, rel=1e-6)
    assert whole.top5 == (1.0 if classes == 3 else whole.hits5 / 50)
    assert model.training
    assert Evaluation().metrics() == {"images": 0, "top1": 0.0, "top5": 0.0, "loss": 0.0}


def test_a_missing_bucket_is_not_a_missing_card(s3: str) -> None:
    with pytest.raises(ModelError, match=r"has no model\.json"):
        read_card(s3)
    with pytest.raises(StorageError, match="is in a bucket that does not exist"):
        read_card("s3://no-such-bucket/model")
