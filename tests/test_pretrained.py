"""torchvision's ResNet-18 as a model directory: what near-duplicates are compared with by default. It comes from a real server over HTTP;
its weights are random here."""

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import torchvision
import yaml
from rich.console import Console

import tiny
from cluster import storage
from cluster.config import Cluster
from cluster.errors import ModelError
from cluster.progress import Display
from cluster.session import Session
from cluster.store import RunStore
from models import weights as pretrained
from models.card import read_card
from models.directory import load
from pipeline.context import Run, Sources
from pipeline.data.sources import open_source
from pipeline.duplicates.exclude import Embeddings, Pairs, features_model
from pipeline.duplicates.nearest import read_pairs
from pipeline.recipe.deduplicate import Deduplicate
from pipeline.recipe.images import Source

Publish = Callable[..., Path]
LEFT_OPEN = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
"""torch leaves a download that fails to the garbage collector."""


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publish]:
    """Puts weights on a server, with the beginning of their hash in the file's name, and makes that the address of ResNet-18."""
    folder = tmp_path / "server"
    folder.mkdir()
    handler = partial(_Handler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def put(content: object, damage: Callable[[bytes], bytes] = bytes) -> Path:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        name = f"resnet18-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"
        (folder / name).write_bytes(damage(buffer.getvalue()))
        monkeypatch.setattr(pretrained, "URL", f"http://127.0.0.1:{server.server_port}/{name}")
        return folder / name

    yield put
    server.shutdown()
    server.server_close()


def random_resnet18() -> torchvision.models.ResNet:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    for name, buffer in network.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 1.5)
        elif "running_mean" in name:
            buffer.uniform_(-0.1, 0.1)
    network.eval()
    return network


@pytest.mark.parametrize(("counted", "place"), [(True, "local"), (False, "s3")], indirect=["place"])
def test_the_directory_predicts_as_torchvision_does(counted: bool, publish: Publish, place: str) -> None:
    network = random_resnet18()
    counters = [name for name in network.state_dict() if name.endswith("num_batches_tracked")]
    state: dict[str, torch.Tensor] = dict(network.named_parameters())
    state |= {name: value for name, value in network.named_buffers() if name not in counters}
    publish(network.state_dict() if counted else state)
    pretrained.publish_resnet18(place, "--model")
    assert {entry.path for entry in storage.list_files(place)} == {"model.json", "model.safetensors"}
    loaded, card = load(place), read_card(place)
    images = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(loaded.model(images), network(images))
    transform = card.model.transform
    theirs = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    assert (transform.size, transform.resize) == (theirs.crop_size[0], theirs.resize_size[0])
    assert (list(transform.mean), list(transform.std)) == (theirs.mean, theirs.std)
    assert (len(card.class_names), card.class_names[0]) == (1000, "tench")


class _Hostile:
    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.sign),)


@LEFT_OPEN
@pytest.mark.parametrize(
    "fault", ["missing", "another hash", "kept and changed", "another network", "no network", "hostile"]
)
def test_weights_that_are_not_what_they_should_be(fault: str, publish: Publish, tmp_path: Path) -> None:
    sign, state = tmp_path / "sign", random_resnet18().state_dict()
    if fault == "missing":
        publish(state).unlink()
        said = "404"
    elif fault == "another hash":
        publish(state, lambda content: content[:-1] + b"x")
        said = "invalid hash value"
    elif fault == "kept and changed":
        whole = publish(state)
        cache = tmp_path / "torch" / "hub" / "checkpoints" / whole.name  # as after a download of torch's own
        cache.parent.mkdir(parents=True)
        cache.write_bytes(whole.read_bytes()[:-1000])
        said = "invalid hash value"
    elif fault == "no network":
        publish([1, 2])
        said = "holds no state dict"
    elif fault == "another network":
        publish(torchvision.models.resnet34(weights=None).state_dict())
        said = "is another network's"
    else:
        publish(_Hostile(sign))
        said = "a pickle that holds more than tensors"
    with pytest.raises(ModelError) as caught:
        pretrained.publish_resnet18(str(tmp_path / "model"), "deduplicate.model")
    assert str(caught.value).startswith("deduplicate.model = 'resnet18': ")
    assert said in str(caught.value)
    assert "name a model directory" in str(caught.value)
    assert not (tmp_path / "model").exists()
    assert not sign.exists()


def test_a_run_gets_it_once(publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, session = publish(random_resnet18().state_dict()), Session(Cluster())
    quiet = Display(Console(quiet=True), enabled=False)
    store = RunStore(str(tmp_path / "run"))
    store.claim("tiny", "")
    this = Run("tiny", "", store, Sources({}), session, quiet)
    assert features_model(this, "deduplicate.model", Deduplicate()) is None  # nothing is compared
    assert features_model(this, "deduplicate.model", Deduplicate(nearest=3, model="teacher")) is None
    features = features_model(this, "deduplicate.model", Deduplicate(nearest=3))
    assert features is not None
    assert Path(features.uri).parent == tmp_path / "run" / "store"
    file.unlink()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "elsewhere"))
    assert features_model(this, "deduplicate.model", Deduplicate(nearest=3)) == features
    with pytest.raises(ModelError, match=r"has no model\.json"):
        features_model(this, "deduplicate.model", Deduplicate(nearest=3, model=str(tmp_path)))


@LEFT_OPEN
@pytest.mark.slow
def test_duplicates_are_compared_with_it_by_default(
    publish: Publish, tmp_path: Path, ray_local: None, tophat: Callable[..., tuple[int, str, str]]
) -> None:
    digits = tiny.digits()["zero"]
    for name, chosen in (("test", digits[:6]), ("u", digits[3:20])):
        (tmp_path / name).mkdir()
        for number, content in enumerate(chosen):
            (tmp_path / name / f"{number:02}.png").write_bytes(content)
    file = publish(random_resnet18().state_dict())
    out, cache = tmp_path / "out", Path(torch.hub.get_dir(), "checkpoints", file.name)
    words = ["--source", str(tmp_path / "u"), "--against", str(tmp_path / "test"), "--nearest", "3", "--set", "pairs=8"]
    content = file.read_bytes()
    file.unlink()
    code, _, errors = tophat("duplicates", "--out", str(out), *words)
    assert (code, errors.count("error: "), errors.count("\n")) == (2, 1, 1), errors
    assert "--model = 'resnet18': cannot be had from http" in errors
    assert not cache.exists()
    file.write_bytes(content)
    code, text, errors = tophat("duplicates", "--out", str(out), *words)  # the same command goes on
    assert code == 0, errors
    assert "compared: 17 images of U with 6; 8 pairs kept" in text
    pairs = read_pairs(str(out / "pairs" / "pairs.parquet")).to_pylist()
    u, test = (open_source("", Source(uri=str(tmp_path / name))).shards()[0].files for name in ("u", "test"))
    found = {(u[p["index"]], test[p["labeled_index"]]) for p in pairs[:3]}
    assert found == {(f"{n:02}.png", f"{n + 3:02}.png") for n in range(3)}
    assert max(p["distance"] for p in pairs[:3]) < 0.01 < pairs[3]["distance"]


@LEFT_OPEN
def test_a_run_asks_for_it_before_it_begins(
    publish: Publish, tmp_path: Path, ray_local: None, tophat: Callable[..., tuple[int, str, str]]
) -> None:
    file = publish(random_resnet18().state_dict())
    content = file.read_bytes()
    file.unlink()
    tiny.write_folders(tmp_path / "data", share=0.2)
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    teacher = {"model": tiny.save_teacher(str(tmp_path / "model"))}
    changes = {"teacher": teacher, "deduplicate": {"nearest": 5, "pairs": 20}}
    recipe.write_text(yaml.safe_dump(tiny.recipe(str(tmp_path / "data"), **changes)))
    words = ("run", str(recipe), "--run-dir", str(run))
    code, _, errors = tophat(*words)
    assert (code, errors.count("error: ")) == (2, 1), errors
    assert "deduplicate.model = 'resnet18': cannot be had from http" in errors
    assert sorted(path.name for path in run.iterdir()) == ["leases", "recipe.yaml", "run.json"]
    code, _, errors = tophat(*words, "--until", "unlabeled")  # which does without it
    assert code == 0, errors
    file.write_bytes(content)
    code, _, errors = tophat(*words, "--until", "excluded")
    assert code == 0, errors
    card = read_card(str(run / "resnet18"))
    assert card.provenance == {"weights": pretrained.URL}
    store = RunStore(str(run))
    embeddings, pairs = store.named("embeddings", Embeddings), store.named("pairs", Pairs)
    assert embeddings is not None
    assert pairs is not None
    assert embeddings.outputs.scored == pairs.outputs.images + pairs.outputs.labeled
    code, text, errors = tophat("status", str(run))
    assert code == 0, errors
    assert re.search(r"excluded +done", text)
