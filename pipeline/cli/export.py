"""Commands that hand a model on: export."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import InputError, ModelError
from pipeline.cli.app import app, out


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory.")],
    to: Annotated[str, typer.Option("--onnx", metavar="FILE", help="What is written: a file or object, *.onnx.")],
    force: Annotated[bool, typer.Option("--force", help="Write over FILE.")] = False,
) -> None:
    """Write a model as an ONNX file: uint8 RGB images in, logits and scores out, class names and sizes in its metadata."""
    if not to.lower().endswith(".onnx"):
        raise InputError("--onnx", to, "must be the name of a file that ends in .onnx", "write e.g. student.onnx")
    from rich import filesize

    from cluster import storage

    place = storage.absolute(to)
    if not storage.is_remote(place) and Path(place).is_dir():
        raise InputError("--onnx", to, "is a folder", "give a file")
    if not force and storage.exists(place):
        raise InputError("--onnx", to, "exists already", "give another one, or --force to write over it")
    from models import export as onnx

    try:
        made = onnx.export(model, to)
    except ModelError as error:
        field = "MODEL" if error.field == "model" else error.field
        raise ModelError(field, error.value, error.rule, error.fix) from None
    out.print(f"onnx: {made.uri} ({filesize.decimal(made.bytes)}, opset {onnx.OPSET})", markup=False)
    out.print(f"input: images, uint8 [batch, 3, {made.size}, {made.size}], RGB", markup=False)
    out.print(f"outputs: logits and scores (their softmax), float32 [batch, {made.classes}]", markup=False)
    if made.images:
        out.print(f"checked: on {made.images} real images, at most {made.difference:.1e} from the network")
    else:
        out.print("not checked: pip install onnxruntime to have it compared with the network")
