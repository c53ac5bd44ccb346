"""`tophat init`: what it finds in images, what it decides from that, and the recipe that it writes."""

from pathlib import Path

import numpy as np
import pytest

import tiny
from cluster.errors import RecipeError
from pipeline.data.labeled import REJECTED, load_labels
from pipeline.recipe.reading import validate
from runs import execute


def drawn(stage: str) -> dict[str, np.ndarray]:
    """The labels of D's three parts, in one array each."""
    return {name: np.concatenate(load_labels(f"{stage}/{name}")[1]) for name in ("train", "validation", "test")}


def test_without_a_test_set_a_part_of_d_is_held_out_for_it(ray_local: None, tmp_path: Path) -> None:
    tiny.write_folders(tmp_path)
    recipe = tiny.recipe(str(tmp_path))
    recipe["labeled"] = {"train": {"uri": str(tmp_path / "train")}, "test_fraction": 0.25, "validation_fraction": 0.34}
    made = execute(validate(recipe), str(tmp_path / "run"), until="labeled-train")["labeled-train"]
    parts = drawn(made.uri)
    used = np.stack([part != REJECTED for part in parts.values()])
    assert (used.sum(axis=0) == 1).all()  # each image in one part
    assert {name: np.bincount(part[part != REJECTED]).tolist() for name, part in parts.items()} == {
        "train": [6, 6, 6],
        "validation": [3, 3, 3],  # of the 9 that the test set leaves
        "test": [3, 3, 3],
    }
    assert (made.outputs.images, made.outputs.held_out, made.outputs.held_for_test) == (18, 9, 9)

    recipe["labeled"]["validation_fraction"] = 0.6
    other = execute(validate(recipe), str(tmp_path / "run"), until="labeled-train")["labeled-train"]
    assert (drawn(other.uri)["test"] == parts["test"]).all()
    assert (drawn(other.uri)["validation"] != parts["validation"]).any()
    recipe["labeled"]["test_fraction"] = 0.5
    assert execute(validate(recipe), str(tmp_path / "run"), until="labeled-train")["labeled-train"].fresh


def test_two_images_a_class_cannot_be_split_in_three(ray_local: None, tmp_path: Path) -> None:
    tiny.write_folders(tmp_path, share=0.17)
    recipe = tiny.recipe(str(tmp_path))
    recipe["labeled"] = {"train": {"uri": str(tmp_path / "train")}}
    with pytest.raises(
        RecipeError, match=r"^labeled\.validation_fraction = 0\.1: can hold out no image, as every class"
    ):
        execute(validate(recipe), str(tmp_path / "run"), until="labeled-train")
