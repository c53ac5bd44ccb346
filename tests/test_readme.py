"""What the documents tell people to write does what they say: each fenced block of Python runs, each recipe is one."""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from models.architectures import build
from models.config import ModelConfig, Transform
from models.directory import load, save
from models.export import export
from models.inputs.image import evaluation_image, normalize
from pipeline.recipe.document import parse
from pipeline.recipe.reading import validate

if TYPE_CHECKING:
    from runs import Finished

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language in all documents, in order."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [block for document in DOCUMENTS for block in fence.findall(document.read_text())]


def test_recipes_are_recipes() -> None:
    recipes = [validate(parse(block)) for block in blocks("yaml") if block.startswith("name:")]
    assert len(recipes) >= 2
    laptop = next(block for block in blocks("yaml") if block.startswith("name:"))
    assert len(laptop.splitlines()) < 15


def test_python_does_what_it_says(
    finished: "Finished", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder with a finished run whose student is one of torchvision's, with its ONNX file, and a photograph."""
    monkeypatch.chdir(tmp_path)
    run = Path(finished.copy(tmp_path / "runs" / "birds"))
    shutil.copytree(run, "runs/demo", symlinks=True)
    Path("DIR").symlink_to((run / "scores").resolve().parent)  # as `tophat score --out DIR` leaves one
    names = json.loads((run / "teacher" / "model.json").read_text())["class_names"]
    torch.manual_seed(0)
    config = ModelConfig(architecture="resnet18", transform=Transform(size=56, resize=64))
    network = build(config, len(names)).eval()
    save(str(run / "student"), network, config=config, class_names=names, metrics={}, provenance={})
    export("runs/birds/student", "bird.onnx")
    part = load_sample_image("flower.jpg")[100:220, 250:360]  # so small that no decoder leaves out any of its pixels
    Image.fromarray(part).save("bird.jpg", quality=95)

    found: dict[str, Any] = {}
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"block {number}", "exec"), found)

    state = found["network"].state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
    image = torch.from_numpy(evaluation_image(Path("bird.jpg").read_bytes(), config.transform))
    with torch.inference_mode():
        batch = normalize(image[None], config.transform, torch.device("cpu"))
        expected = load("runs/birds/student").model(batch).softmax(1)[0]
    printed = capsys.readouterr().out
    name, score = next(line for line in printed.splitlines() if line.split()[0] in names).split()
    assert name == names[int(expected.argmax())]
    assert float(score) == pytest.approx(float(expected.max()), abs=1e-3)

    stages = finished.stages
    assert len(found["pd"].read_parquet("runs/birds/scores")) == stages["scores"].outputs.scored
    assert len(found["rejects"]) == stages["scores"].outputs.rejected
    assert found["evaluation"].loc["student", "top1"] == stages["evaluation"].outputs.models["student"].top1
    selected = found["selected"]
    assert len(selected) == stages["selection"].outputs.selected
    assert set(selected["file"].str.rpartition(".")[2]) == {"png"}
    assert all(row.class_id in list(row.class_ids) for row in selected.itertuples())
