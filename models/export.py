"""A model directory as one ONNX file that needs nothing of tophat: the normalization is inside, what comes before it is in the metadata.

Input `images`: uint8 [batch, 3, size, size], RGB, of any batch. Outputs: `logits` and `scores`, their softmax, float32 [batch, classes].
The metadata properties say how an encoded image becomes such an input, and what the outputs are called.
"""

import json
import warnings
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO, StringIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from cluster import storage
from cluster.errors import InputError, ModelError, StageError, one_line
from models.card import read_card
from models.config import Transform
from models.directory import LoadedModel, load
from models.inputs.image import evaluation_image, normalize

OPSET = 18
"""Version of ONNX's operators, of 2022: what runtimes of today know."""
TOLERANCE = 1e-4
"""By how much the file may differ from the network: scores by so much, logits by this part of the largest, or of 1."""
LARGEST = 2**31 - 2**24
"""Bytes of weights that find room in one ONNX file, whose limit is 2 GiB."""
NOT_BEFORE_A_NETWORK = {"crop", "scale", "padding", "flip", "max_pixels", "mean", "std"}
"""Fields of a transform that are for training or for hostile bytes, or that the file does itself."""


@dataclass(frozen=True)
class Exported:
    """An ONNX file.

    Attributes:
        uri: of the file.
        bytes: its size.
        size: side of the images that it takes, in pixels.
        classes: how many there are.
        images: real images on which it was compared with the network; 0 where there is no runtime to compare with.
        difference: the largest on those, as `TOLERANCE` has it.
    """

    uri: str
    bytes: int
    size: int
    classes: int
    images: int
    difference: float


class _Deployed(nn.Module):
    """A network from bytes of pixels to logits and scores.

    Args:
        model: from normalized images to logits.
        transform: whose `mean` and `std` are used.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, transform: Transform) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", 255 * torch.tensor(transform.mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(transform.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model((images.float() - self.mean) / self.std)
        return logits, logits.softmax(dim=1)


def export(model: str, uri: str) -> Exported:
    """Publishes a model directory as an ONNX file, compared with the network on real images before.

    Args:
        model: the model directory. One whose architecture is an import path runs the user's code.
        uri: of the file; one that is there is replaced. The same model makes the same bytes.

    Raises:
        InputError: a package is missing.
        ModelError: it cannot be loaded, or not be told in ONNX's operators, or is too large for one file.
        StageError: the file says something else than the network; it is not published.
        StorageError: the store refuses.
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise InputError(
                "--onnx", uri, f"needs the package {package}, which is not there", "pip install 'tophat[onnx]'"
            )
    size = read_card(model).weights.size
    if size > LARGEST:
        rule = f"has {size / 2**30:.1f} GiB of weights, which is more than an ONNX file holds (2 GiB)"
        raise ModelError("model", model, rule, "export a smaller one")
    target = storage.absolute(uri)
    storage.check_writable("--onnx", target.rpartition("/")[0])
    loaded = load(model)
    content = _onnx(model, loaded)
    images, difference = (0, 0.0) if find_spec("onnxruntime") is None else _compared(content, loaded)
    if not difference <= TOLERANCE:
        raise StageError(
            f"{model}: as ONNX it says something else than the network, by {difference:.2g} on real images where {TOLERANCE:g} is allowed; "
            "nothing is written"
        )
    storage.publish(target, content)
    side = loaded.config.transform.size
    return Exported(target, len(content), side, len(loaded.class_names), images, difference)


def _onnx(uri: str, loaded: LoadedModel) -> bytes:
    """The content of the file."""
    import onnx

    transform = loaded.config.transform
    example = torch.zeros(2, 3, transform.size, transform.size, dtype=torch.uint8)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Deployed(loaded.model, transform).eval(),
                (example,),
                dynamo=True,
                input_names=["images"],
                output_names=["logits", "scores"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                opset_version=OPSET,
                verbose=False,
            )
            assert program is not None  # it is None only where a file's name is given
            made = program.model_proto
    except Exception as error:  # the forward pass may be the user's code, and the exporter raises what it meets
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        rule = f"cannot be exported ({type(cause).__name__}: {one_line(str(cause))[:300]})"
        fix = "use operations that torch.export knows, for any number of images"
        raise ModelError("model", uri, rule, fix) from None
    _forget_origin(made.graph)
    for function in made.functions:
        _forget_origin(function)
    onnx.helper.set_model_props(made, _properties(loaded))
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString(deterministic=True))


def _forget_origin(graph: Any) -> None:
    """Takes out of a graph or function where each of its parts came from: paths of this machine, as large as a small network."""
    parts = ("node", "input", "output", "value_info", "initializer")
    for part in (one for name in parts for one in getattr(graph, name, ()) if not isinstance(one, str)):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
        for attribute in getattr(part, "attribute", ()):
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _forget_origin(inner)
    graph.ClearField("metadata_props")


def _properties(loaded: LoadedModel) -> dict[str, str]:
    """What the file says of itself; all values are JSON, but for plain texts."""
    transform = loaded.config.transform.model_dump(mode="json", exclude=NOT_BEFORE_A_NETWORK)
    return {
        "class_names": json.dumps(loaded.class_names),
        "architecture": loaded.config.architecture,
        **{name: value if isinstance(value, str) else json.dumps(value) for name, value in transform.items()},
    }


def _compared(content: bytes, loaded: LoadedModel) -> tuple[int, float]:
    """How many real images the file was compared with the network on, and by how much they differ; not a number, where either says none."""
    import onnxruntime

    images = np.stack(list(_photographs(loaded.config.transform)))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        batch = normalize(torch.from_numpy(images), loaded.config.transform, torch.device("cpu"))
        logits = loaded.model(batch)
    differences = []
    for some in (slice(0, 1), slice(0, len(images))):  # batches of other sizes than the exporter saw
        found, scores = (torch.from_numpy(one) for one in session.run(["logits", "scores"], {"images": images[some]}))
        scale = logits[some].abs().max().clamp(min=1)
        differences += [(found - logits[some]).abs().max() / scale, (scores - logits[some].softmax(1)).abs().max()]
    return len(images), float(torch.stack(differences).max())


def _photographs(transform: Transform) -> Iterable[NDArray[np.uint8]]:
    """The photographs that scikit-learn has, also turned over, as the network sees them: uint8 [3, size, size]."""
    from sklearn.datasets import load_sample_images

    for pixels in load_sample_images().images:
        for turned in (pixels, pixels[:, ::-1], pixels[::-1], pixels[::-1, ::-1]):
            file = BytesIO()
            Image.fromarray(turned).save(file, "PNG")
            yield evaluation_image(file.getvalue(), transform)
