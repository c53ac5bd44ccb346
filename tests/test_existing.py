"""Networks that exist elsewhere as model directories: what they say of images is what their own library says."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from cluster.errors import ModelError
from models.card import read_card
from models.config import ModelConfig, Transform
from models.directory import load
from models.inference import Inference, Predictor
from models.inputs.image import evaluation_image
from models.sources import SourceSpec, is_spec, obtain

NAMES = ("cat", "dog", "a bird", "fish", "tree")
Pictures = list[Image.Image]


@pytest.fixture
def photographs() -> Pictures:
    """Parts of real photographs, of several shapes; the larger sides differ from the shorter by even numbers."""
    from sklearn.datasets import load_sample_images

    images = [Image.fromarray(image) for image in load_sample_images().images]
    boxes = [(0, 0, 400, 400), (20, 10, 420, 310), (100, 0, 340, 360), (0, 0, 600, 400)]
    return [image.crop(box) for image in images for box in boxes]


def our_softmax(uri: str, photographs: Pictures) -> Tensor:
    """Of every class, in the order of the classes: [images, classes]."""
    classes = len(read_card(uri).class_names)
    predictor = Predictor(uri, Inference(classes_per_image=classes, threads=2))
    decoded = []
    for image in photographs:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        decoded.append(evaluation_image(buffer.getvalue(), predictor.transform))
    found = predictor(np.stack(decoded))
    scores = torch.zeros(len(photographs), classes)
    return scores.scatter(1, torch.from_numpy(found.classes).long(), torch.from_numpy(found.scores))


def their_softmax(network: nn.Module, transform: Callable[[Image.Image], Any], photographs: Pictures) -> Tensor:
    with torch.inference_mode():
        logits = network.eval()(torch.stack([transform(image) for image in photographs]))
    softmax: Tensor = logits.softmax(1)
    return softmax


def agree(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() < 1e-4
    assert theirs.std(0).max() > 1e-2, "the network says the same of every image"


def lively(network: nn.Module, size: int, photographs: Pictures) -> nn.Module:
    """A random network that says something else of each image: as if it had seen them, and with a last layer that is sure of itself."""
    images = torch.stack([v2.functional.pil_to_tensor(image.resize((size, size))) / 64 - 2 for image in photographs])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(8):
            network.train()(images)
        output: Any = network.eval()(images)
        logits = getattr(output, "logits", output)
        last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
        last.weight *= 0.3 / logits.std(0).mean()
    return network


def rebuilt(uri: str, classes: int) -> None:
    """The architecture builds again with another number of classes."""
    from models.architectures import build

    config = read_card(uri).model
    network = build(config, classes).eval()
    size = config.transform.size
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, size, size)).shape == (2, classes)


def test_what_is_a_spec() -> None:
    specs = [
        "torchvision:resnet18",
        "timm:resnet18.a1_in1k",
        "timm:local-dir:/a/b",
        "open_clip:ViT-B-32/laion2b",
        "hf:a/b",
    ]
    specs += ["package.module:factory", "package:Class.make"]
    assert all(is_spec(text) for text in [*specs, "timm:"])  # which has no name: said as of a library
    assert not any(is_spec(text) for text in ["runs/a/model", "s3://bucket/model", "/a/b", "resnet18", "a:b/c"])
    code = "import sys; import models.sources as s; print(s.is_spec('timm:x'), {'torch', 'timm', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "True set()\n"


def test_torchvision(tmp_path: Path, photographs: Pictures) -> None:
    from torchvision.models import ResNet18_Weights, resnet18

    torch.manual_seed(0)
    network, weights = lively(resnet18(weights=None), 224, photographs), ResNet18_Weights.DEFAULT
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    uri = str(tmp_path / "model")
    card = obtain(SourceSpec("torchvision:resnet18", str(tmp_path / "weights.pth")), uri, "SPEC")
    assert card.class_names == weights.meta["categories"]
    assert card == read_card(uri)
    agree(our_softmax(uri, photographs), their_softmax(network, weights.transforms(), photographs))
    rebuilt(uri, 3)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_timm(mode: str, tmp_path: Path, photographs: Pictures) -> None:
    timm: Any = importlib.import_module("timm")

    torch.manual_seed(0)
    arguments = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
    overlay = {"crop_mode": mode, "crop_pct": 0.9 if mode == "center" else 1.0, "license": "mit", "tag": "mine"}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, pretrained_cfg_overlay=overlay, **arguments)
    lively(network, 64, photographs)
    timm.models.save_for_hf(
        network,
        tmp_path / "theirs",
        model_config={"label_names": list(NAMES)},
        model_args=arguments,
        safe_serialization=True,
    )
    uri = str(tmp_path / "model")
    card = obtain(SourceSpec(f"timm:local-dir:{tmp_path / 'theirs'}"), uri, "SPEC")
    assert (card.class_names, card.model.transform.size) == (list(NAMES), 64)
    assert card.source is not None
    assert (card.source.license, card.source.revision) == ("mit", "mine")
    assert str(tmp_path) not in card.model.model_dump_json()
    again = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(again))
    agree(our_softmax(uri, photographs), their_softmax(again, transform, photographs))
    assert set(load(uri).model.state_dict()) == set(network.state_dict())
    rebuilt(uri, 3)


CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.mark.parametrize("siglip", [False, True])
def test_open_clip_zero_shot(siglip: bool, tmp_path: Path, photographs: Pictures) -> None:
    open_clip: Any = importlib.import_module("open_clip")

    name = f"small-clip-{siglip}"
    config = {**CLIP, "quick_gelu": True, **({"init_logit_bias": -10, "custom_text": True} if siglip else {})}
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.0 / parameter[0].numel() ** 0.5)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    templates = ("a photo of a {}.", "a drawing of a {}.")
    uri = str(tmp_path / "model")
    wanted = SourceSpec(f"open_clip:{name}", str(tmp_path / "clip.pt"), NAMES, templates)
    card = obtain(wanted, uri, "SPEC")
    texts = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer(name), NAMES, templates)
    with torch.inference_mode():
        features = model.encode_image(torch.stack([preprocess(image) for image in photographs]), normalize=True)
        theirs = (model.logit_scale.exp() * features @ texts).softmax(1)
    agree(our_softmax(uri, photographs), theirs)
    assert card.class_names == list(NAMES)
    state = load(uri).model.state_dict()
    assert {key for key in state if not key.startswith("fc.")} == {
        k for k in model.state_dict() if k.startswith("visual.")
    }
    rebuilt(uri, 3)
    blank = obtain(SourceSpec(f"open_clip:{name}", str(tmp_path / "clip.pt"), NAMES), str(tmp_path / "blank"), "SPEC")
    assert blank.parameters == card.parameters
    assert not load(str(tmp_path / "blank")).model.get_parameter("fc.weight").any()


@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext"])
def test_transformers(kind: str, tmp_path: Path, photographs: Pictures) -> None:
    hf: Any = importlib.import_module("transformers")

    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    if kind == "vit":
        config = hf.ViTConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=64,
            image_size=64,
            patch_size=16,
            **labels,
        )
        network: Any = hf.ViTForImageClassification(config)
        processor: Any = hf.ViTImageProcessor(size={"height": 64, "width": 64})
    elif kind == "resnet":
        config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", **labels)
        network = hf.ResNetForImageClassification(config)
        processor = hf.CLIPImageProcessor(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64})
    else:
        config = hf.ConvNextConfig(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], **labels)
        network = hf.ConvNextForImageClassification(config)
        processor = hf.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875)
    lively(network, 64, photographs)
    folder = tmp_path / "theirs"
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    uri = str(tmp_path / "model")
    card = obtain(SourceSpec(f"hf:{folder}"), uri, "SPEC")
    assert card.class_names == list(NAMES)
    assert card.source is not None
    assert card.source.license == "apache-2.0"
    assert str(tmp_path) not in card.model.model_dump_json()
    processor = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.inference_mode():
        theirs = network(**processor(photographs, return_tensors="pt")).logits.softmax(1)
    agree(our_softmax(uri, photographs), theirs)
    assert set(load(uri).model.state_dict()) == set(network.state_dict())
    rebuilt(uri, 3)


def lines(tmp_path: Path, names: list[str]) -> str:
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(names) + "\n", "utf-8")
    return str(path)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    place = str(Path(__file__).parent)
    return subprocess.run(
        [sys.executable, "-m", "pipeline", "teacher", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(place).parent,
        env={**os.environ, "PYTHONPATH": place, **environment},
    )


def test_real_weights_by_import_path(tmp_path: Path, photographs: Pictures) -> None:
    from torchvision.models import ResNet18_Weights

    import networks

    names = ResNet18_Weights.DEFAULT.meta["categories"]
    uri = str(tmp_path / "model")
    sets = ["--set", "transform.interpolation=bicubic", "--set", "transform.mean=[0.5, 0.5, 0.5]"]
    sets += ["--set", "transform.std=[0.5, 0.5, 0.5]"]
    done = command("networks:lite0", "--out", uri, "--classes", lines(tmp_path, names), *sets)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"parameters +4,652,008", done.stdout)
    assert "1,000: tench, goldfish, great white shark, ..." in done.stdout
    steps = [v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()]
    transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    ours = our_softmax(uri, photographs)
    agree(ours, their_softmax(networks.lite0(1000), transform, photographs))
    assert {names[number] for number in ours.argmax(1).tolist()} & {
        "daisy",
        "palace",
        "castle",
        "pot",
        "bee",
        "greenhouse",
    }


@pytest.mark.slow  # a process each
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["torchvision:resnet19"], "use one of resnet18"),
        (["timm:resnet18x"], "use one of resnet18"),
        (["open_clip:ViT-B-33"], "use one of ViT-B-32"),
        (["open_clip:ViT-B-32/nowhere"], "TAG one of openai"),
        (["resnet18"], "names no network of a library"),
        (["torchvision:resnet18", "--weights", "missing.pth"], "No such file"),
        (["torchvision:resnet18", "--weights", "hostile.pth"], "holds no weights alone"),
        (
            ["torchvision:resnet18", "--weights", "other.safetensors"],
            "do not fit torchvision:resnet18: bn1.bias is missing",
        ),
        (["torchvision:resnet18", "--weights", "good.safetensors", "--classes", "two.txt"], "has 1000 classes"),
        (["torchvision:resnet18", "--weights", "good.safetensors", "--set", "transform.size=300"], "resize"),
        (
            ["torchvision:resnet18", "--weights", "good.safetensors", "--set", "transform.fit=stretch"],
            "--set transform.fit",
        ),
        (["torchvision:resnet18", "--weights", "good.safetensors", "--classes", "gap.txt"], "has an empty line 2"),
        (["timm:local-dir:nowhere"], "is no folder with a config.json"),
        (["hf:nowhere/at-all"], "cannot be had from transformers"),
        (["networks:lite0"], "does not say its classes"),
        (["networks:absent", "--classes", "two.txt"], "could not be imported"),
    ],
)
def test_what_cannot_be_had_is_one_line(arguments: list[str], said: str, tmp_path: Path, torch_files: Path) -> None:
    places = [str(torch_files / part) if "." in part and (torch_files / part).exists() else part for part in arguments]
    uri = tmp_path / "model"
    done = command(*places, "--out", str(uri), HF_HUB_OFFLINE="1")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [done.stderr.splitlines()[-1]]
    assert not uri.exists() or not any(uri.iterdir())
    assert not (torch_files / "sign").exists()


class _Hostile:
    def __init__(self, sign: str) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.sign,)


@pytest.fixture(scope="module")
def torch_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torchvision.models import resnet18

    folder = tmp_path_factory.mktemp("files")
    state = resnet18(weights=None).state_dict()
    save_file(state, folder / "good.safetensors")
    save_file({"conv1.weight": state["conv1.weight"]}, folder / "other.safetensors")
    torch.save({"conv1.weight": _Hostile(str(folder / "sign"))}, folder / "hostile.pth")
    (folder / "two.txt").write_text("a\nb\n")
    (folder / "gap.txt").write_text("a\n\nb\n")
    return folder


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    done = command("torchvision:resnet18", "--out", str(tmp_path / "model"))
    assert (done.returncode, "is not empty" in done.stderr) == (2, True)
    assert (tmp_path / "model" / "model.json").read_text() == "{}"


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=re.escape("pip install 'tophat[teachers]'")):
        obtain(SourceSpec("timm:resnet18"), str(tmp_path), "SPEC")


def test_a_trunk_without_classes_gets_a_layer_to_be_trained(tmp_path: Path) -> None:
    timm: Any = importlib.import_module("timm")
    network = timm.create_model("resnet10t", num_classes=0)
    timm.models.save_for_hf(network, tmp_path / "theirs", safe_serialization=True)
    wanted = SourceSpec(
        f"timm:local-dir:{tmp_path / 'theirs'}", class_names=NAMES, transform={"size": 64, "resize": 64}
    )
    with pytest.raises(ModelError, match="does not say its classes"):
        obtain(SourceSpec(wanted.spec), str(tmp_path / "none"), "SPEC")
    card = obtain(wanted, str(tmp_path / "model"), "SPEC")
    model = load(str(tmp_path / "model")).model
    assert (card.class_names, card.model.transform.size) == (list(NAMES), 64)
    with torch.inference_mode():
        assert not model(torch.rand(2, 3, 64, 64)).any()
    assert torch.equal(model.state_dict()["conv1.0.weight"], network.state_dict()["conv1.0.weight"])


def test_architectures_of_libraries_are_built_by_name() -> None:
    from models.architectures import build

    small = Transform(size=64, resize=64)
    vit = {"image_size": 64, "num_hidden_layers": 1}
    for name, options in (("torchvision:googlenet", {}), ("timm:resnet10t", {}), ("hf:vit", vit)):
        network = build(ModelConfig(architecture=name, options=dict(options), transform=small), 3)
        assert network(torch.rand(2, 3, 64, 64)).shape == (2, 3)
    with pytest.raises(ModelError, match="is no model type of transformers"):
        build(ModelConfig(architecture="hf:google/vit-base-patch16-224"), 3)
