"""On a GPU, where there is one: the same predictions as on a CPU, from several threads at once, and the whole pipeline."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from cluster.store import RunStore
from models.config import ModelConfig, Transform
from models.directory import load
from pipeline.evaluation import Trained
from pipeline.scoring.score import Scored
from test_inference import pictures, plain_logits, predictor, saved

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CONFIG = ModelConfig(architecture="resnet50", transform=Transform(size=64, resize=80))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("gpu"), CONFIG)


@pytest.mark.parametrize("compiled", [False, True])
def test_float32_is_that_of_the_plain_network_on_a_cpu(model: str, compiled: bool) -> None:
    images = pictures(70, 64)
    expected = plain_logits(model, images).softmax(1).topk(5, dim=1)
    found = predictor(model, gpu=True, batch_size=32, compile=compiled)(images)
    np.testing.assert_array_equal(found.classes, expected.indices.numpy())
    np.testing.assert_allclose(found.scores, expected.values.numpy(), atol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_short_formats_are_close_and_others(model: str, precision: str) -> None:
    images = pictures(70, 64)
    expected = plain_logits(model, images).softmax(1).topk(5, dim=1).values.numpy()
    found = predictor(model, gpu=True, precision=precision)(images)
    assert 0 < np.abs(found.scores - expected).max() < 0.05


def test_views_and_features_are_those_of_a_cpu(model: str) -> None:
    images = pictures(9, CONFIG.transform.seen_by("ten").size)
    here, there = (predictor(model, gpu=gpu, views="ten", features=True)(images) for gpu in (False, True))
    np.testing.assert_array_equal(there.classes, here.classes)
    np.testing.assert_allclose(there.scores, here.scores, atol=1e-5)
    assert here.features is not None
    assert there.features is not None
    np.testing.assert_allclose(there.features, here.features, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_get_their_own_answers(model: str, compiled: bool) -> None:
    """Which share the network, and no memory: each has its own images, of its own number."""
    predict = predictor(model, gpu=True, batch_size=64, compile=compiled, features=True)
    asked = [pictures(100 + 7 * seed, 64, seed) for seed in range(12)]
    alone = [predict(images) for images in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(predict, asked * 5))
    for found, expected in zip(together, alone * 5, strict=True):
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
        assert found.features is not None
        assert expected.features is not None
        np.testing.assert_allclose(found.features, expected.features, rtol=2e-3, atol=1e-3)


def test_the_whole_pipeline(tmp_path: Path) -> None:
    tiny.write_folders(tmp_path)
    recipe = tiny.recipe(str(tmp_path), cluster={})
    recipe["score"] |= {"gpus_per_actor": 0.5, "precision": "bfloat16", "embedding": True}
    for training in (recipe["teacher"]["training"], recipe["pretrain"], recipe["fine_tune"]["training"]):
        training |= {"gpus_per_worker": 1, "precision": "bfloat16"}
    recipe["supervised"] |= {"gpus_per_worker": 1, "precision": "float16"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pipeline", "run", str(tmp_path / "recipe.yaml"), "--run-dir", str(run)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert ended.returncode == 0, ended.stderr
    store = RunStore(str(run))
    scores, trained = store.named("scores", Scored), store.named("student", Trained)
    assert scores is not None
    assert trained is not None
    assert scores.outputs.scored == tiny.UNLABELED
    student = load(trained.uri).model
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in student.parameters())
