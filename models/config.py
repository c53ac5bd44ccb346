"""The recipe's sections about models: what enters a network, which network, and how it is trained.

Imports nothing heavy: the command line loads this file to show its help.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from math import ceil
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cluster.section import FREE, Section, Unit

Channel = Annotated[float, Field(ge=0.0, le=1.0)]
Deviation = Annotated[float, Field(gt=0.0, le=10.0)]
Scale = Annotated[float, Field(gt=0.0, le=1.0)]
Views = Literal["center", "mirrored", "five", "ten"]
Outputs = tuple[int | tuple[int, ...], ...]
"""Of each class, the network's output; or several, whose probabilities add up."""

Pixels = Annotated[int, Unit("in pixels")]
PER_256 = Unit("per 256 images")

CPU_BATCH, GPU_BATCH = 32, 256
"""Images of a forward pass in inference: on a CPU core, what its caches still help with; on a GPU, what fills it."""

REFERENCE_BATCH = 256
"""The minibatch that a learning rate is stated for (section 4.1: "0.1 and 256 are the standard")."""


class Transform(Section):
    """How an encoded image becomes a network's input. The defaults are the ones usual for ImageNet."""

    size: Pixels = Field(default=224, ge=8, le=1024)
    """Side of the square fed to the network, in pixels."""
    resize: Pixels = Field(default=256, ge=8, le=2048)
    """Shorter side of the image before the center crop of `size` is taken, in pixels; from `size` to twice `size`, by default 8/7 of it. Means nothing beside
    a `fit` other than `crop`."""
    fit: Literal["crop", "pad", "squash"] = "crop"
    """How an image of another shape becomes a square: by the center crop; whole, with the mean color beside it (`pad`), which keeps what is
    tall or wide; or whole and distorted (`squash`)."""
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos"] = "bilinear"
    """How pixels are resized, as Pillow does it: with antialiasing, but for `nearest`."""
    crop: Literal["random_resized", "pad", "none"] = "random_resized"
    """The crop in training: of a random area and aspect ratio (ImageNet; of the square picture that `fit` makes), shifted within `padding`
    (small images), or none: the picture is as in evaluation."""
    scale: tuple[Scale, Scale] = (0.08, 1.0)
    """Smallest and largest share of the image's area that `random_resized` keeps."""
    padding: Pixels = Field(default=4, ge=1, le=256)
    """Black pixels put around the image by `pad` before it crops at random; at most half of `size`."""
    flip: bool = True
    """Mirror every other training image at random; wrong for digits and letters."""
    exact: bool = False
    """In evaluation and scoring, resize the whole image and then crop it, and decode JPEGs at their full size, as other libraries do: the same
    pixels as theirs. Else both are done at once, and large JPEGs decoded smaller, which is up to several times as fast and differs by
    little."""
    mean: tuple[Channel, Channel, Channel] = (0.485, 0.456, 0.406)
    """Mean of each channel (red, green, blue), of values in [0, 1]."""
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, of values in [0, 1]."""
    max_pixels: int = Field(default=100_000_000, ge=1_000, le=2_000_000_000)
    """An image with more pixels is rejected before it is decoded (3 bytes of memory each)."""

    @model_validator(mode="before")
    @classmethod
    def _in_proportion(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or "resize" in given:
            return given
        size = getattr(given.get("size"), "said", given.get("size"))
        return {**given, "resize": round(size * 8 / 7)} if isinstance(size, int) and size >= 8 else given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.fit == "crop" and not self.size <= self.resize <= 2 * self.size:
            raise ValueError(
                f"resize = {self.resize} must be from size ({self.size}) to twice size ({2 * self.size}): "
                "the center crop takes `size` pixels out of `resize`"
            )
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale = {list(self.scale)} must be [smallest, largest]")
        if self.crop == "pad" and 2 * self.padding > self.size:
            raise ValueError(f"padding = {self.padding} must be at most {self.size // 2}, half of size")
        return self

    def seen_by(self, views: Views) -> "Transform":
        """What to decode with for those views: the corners are of a square of `resize`, the center is of `size`."""
        return self.model_copy(update={"size": self.resize}) if views in ("five", "ten") else self


SMALL_RESNETS = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56")
"""For small images (He et al. 2015, section 4.2)."""
ARCHITECTURES = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "resnext101_32x4d",
    "resnext101_32x8d",
    "resnext101_32x16d",
    "resnext101_32x48d",
    *SMALL_RESNETS,
)
"""The architectures that have a name; `models.architectures` builds them."""


IMPORT_PATH = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")
"""A factory: `package.module:factory`."""

LIBRARIES = ("torchvision", "timm", "open_clip", "hf")
"""The libraries whose networks have a name: `LIBRARY:NAME`. `hf` is Hugging Face's transformers."""


class ModelConfig(Section):
    """A network and what it takes in."""

    architecture: str = Field(default="resnet50", min_length=1, max_length=200)
    """A name (`resnet18`, `resnet50`, `resnext101_32x8d`, `resnet20` for small images, ...), a library's (`torchvision:NAME`, `timm:NAME`,
    `open_clip:NAME`, `hf:TYPE`), or an import path `package.module:factory`, called as `factory(num_classes=..., **options)`."""
    options: dict[str, bool | int | float | str] = Field(default_factory=dict, max_length=50)
    """Arguments for the architecture, such as `width: 8` for the small ResNets. A library's network may have its configuration here, `config`,
    as JSON."""
    transform: Transform = Transform()
    """What happens to an image before it."""

    @field_validator("architecture")
    @classmethod
    def _named(cls, name: str) -> str:
        library, _, rest = name.partition(":")
        if name in ARCHITECTURES or (library in LIBRARIES and rest) or IMPORT_PATH.fullmatch(name):
            return name
        near = get_close_matches(name, ARCHITECTURES, n=3) or ARCHITECTURES
        raise ValueError(
            f"is no known architecture; use one of {', '.join(near)}, or an import path package.module:factory"
        )

    def with_input(self, changed: Mapping[str, Any]) -> Self:
        """The same network, with some fields of its transform changed.

        Raises:
            ValueError: they do not fit the others.
        """
        transform = Transform.model_validate({**self.transform.model_dump(), **changed})
        return self.model_copy(update={"transform": transform})


class Training(Section):
    """One training by synchronous SGD (section 4.1). With `images_seen` and `epochs`, the longer of both is its length; with neither, it is
    as long as is usual."""

    images_seen: int | None = Field(default=None, ge=1, le=10**13)
    """Length: images processed forward and backward, over all workers (the paper's "#iter")."""
    epochs: int | None = Field(default=None, ge=1, le=100_000)
    """Length: passes over the data."""
    batch_size: Annotated[int, FREE] = Field(default=24, ge=1, le=65_536)
    """Images per worker and step. The minibatch, `batch_size * workers`, decides: however it is shared out, the result is the same."""
    workers: Annotated[int, FREE] = Field(default=1, ge=1, le=4096)
    """Processes that train together (DDP)."""
    cpus_per_worker: Annotated[int, FREE] = Field(default=1, ge=1, le=1024)
    """CPUs of each worker; also its number of threads."""
    gpus_per_worker: Annotated[int, FREE] = Field(default=0, ge=0, le=1)
    """1 trains on a GPU, 0 on CPUs."""
    learning_rate: Annotated[float, PER_256] = Field(default=0.1, gt=0.0, le=100.0)
    """Learning rate per 256 images: the peak is `learning_rate / 256 * batch_size * workers` (linear scaling). Of the small ResNets from
    random weights, 2 by default."""
    warmup: float = Field(default=0.0, ge=0.0, le=0.5)
    """Share of the run in which the rate rises linearly from `learning_rate` to the peak; ends before the first drop.
    (Nothing rises where the minibatch is 256 or less: the peak is not above `learning_rate`.)"""
    drops: int = Field(default=3, ge=0, le=100)
    """How often the rate drops, at equally spaced points: the run has `drops + 1` equal parts."""
    drop_factor: float = Field(default=0.1, gt=0.0, le=1.0)
    """What the rate is multiplied by at each drop."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: float = Field(default=1e-4, ge=0.0, le=1.0)
    """L2 penalty on all parameters."""
    freeze: Literal["none", "trunk"] = "none"
    """`trunk` trains the last layer alone: all before it, its batch statistics too, stays as it is."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the forward and backward passes; weights stay float32. float16 needs a GPU."""
    max_failures: Annotated[int, FREE] = Field(default=3, ge=0, le=1000)
    """How often the workers are restarted from the last checkpoint after one of them was lost."""
    checkpoint_every_images: Annotated[int | None, FREE] = Field(default=None, ge=1, le=10**13)
    """Images seen between two checkpoints; none means one a minute, or fewer where writing one takes long."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.images_seen is None and self.epochs is None:
            raise ValueError("state its length: images_seen, epochs, or both, and then the longer of them counts")
        if self.warmup > 1 / (self.drops + 1):
            raise ValueError(
                f"warmup = {self.warmup:g} must end before the first drop: at most {1 / (self.drops + 1):.3g} "
                f"with drops = {self.drops}"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = true needs momentum above 0")
        if self.precision == "float16" and self.gpus_per_worker == 0:
            raise ValueError("precision = float16 needs gpus_per_worker = 1; on CPUs use bfloat16 or float32")
        return self

    def deciding(self) -> dict[str, Any]:
        """The minibatch stands for the workers and what each takes at a step."""
        return {**super().deciding(), "minibatch": self.global_batch}

    @property
    def global_batch(self) -> int:
        """Images per step, over all workers (the paper's overall minibatch size)."""
        return self.batch_size * self.workers

    @property
    def peak_learning_rate(self) -> float:
        """Learning rate after the warm-up: linear scaling, section 4.1."""
        return self.learning_rate / REFERENCE_BATCH * self.global_batch

    def total_images(self, epoch_images: int) -> int:
        """Images seen in the whole training, when one epoch has `epoch_images`."""
        return max(self.images_seen or 0, (self.epochs or 0) * epoch_images)

    def steps(self, epoch_images: int) -> int:
        """Optimizer steps in the whole training: the last one completes the minibatch."""
        return max(1, ceil(self.total_images(epoch_images) / self.global_batch))
