"""Images out of hostile bytes, against torchvision's transforms, and every way to be undecodable."""

import io
import pickle
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import ValidationError
from torchvision.transforms import v2

from cluster.errors import RecipeError
from cluster.section import Plain
from models.config import Transform
from models.inputs.boxes import random_box, whole_box
from models.inputs.image import REASONS, UndecodableImage, decode, evaluation_image, normalize, training_image
from pipeline.recipe.sections import Score
from pipeline.scoring.score import check_views

SMALL = Transform(size=28, resize=32)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth and colorful, so that resizing it has one right answer."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize(("width", "height"), [(32, 32), (28, 28), (100, 60), (61, 99), (31, 300), (640, 480), (9, 9)])
def test_evaluation_is_torchvisions_resize_and_center_crop(width: int, height: int) -> None:
    image = picture(width, height)
    reference = v2.Compose([v2.Resize(32), v2.CenterCrop(28), v2.PILToTensor()])(image).numpy()
    got = evaluation_image(encoded(image), SMALL)
    assert got.shape == (3, 28, 28)
    assert got.dtype == np.uint8
    assert difference(got, reference) <= 1


SHAPES = [(32, 32), (28, 28), (100, 60), (61, 99), (31, 300), (640, 480), (9, 9)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@pytest.mark.parametrize("kind", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_each_fit_and_interpolation_is_pils(width: int, height: int, kind: Interpolation) -> None:
    image, method = picture(width, height), Image.Resampling[kind.upper()]
    crop = v2.Compose([v2.Resize(32, v2.InterpolationMode(kind)), v2.CenterCrop(28)])
    mean = tuple(round(255 * value) for value in SMALL.mean)
    references = {
        "crop": crop(image),
        "pad": ImageOps.pad(image, (28, 28), method, mean),
        "squash": image.resize((28, 28), method),
    }
    data = encoded(image)
    for fit, reference in references.items():
        got = evaluation_image(
            data, Transform.model_validate({**SMALL.model_dump(), "fit": fit, "interpolation": kind})
        )
        away = np.abs(got.astype(int) - np.asarray(reference).transpose(2, 0, 1))
        # A coordinate between two pixels is rounded either way: the nearest pixel is then the one or the other.
        assert (
            (away > 1).mean() < 0.1 if (fit, kind) == ("crop", "nearest") else away.max() <= 1 + (kind == "lanczos")
        ), fit


@pytest.mark.parametrize("kind", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("width", "height"), [*SHAPES, (1600, 1200)])
def test_an_exact_image_has_torchvisions_pixels(width: int, height: int, kind: Interpolation) -> None:
    mode, noise = v2.InterpolationMode(kind), np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    steps = {"crop": [v2.Resize(32, mode), v2.CenterCrop(28)], "squash": [v2.Resize((28, 28), mode)]}
    data = encoded(Image.fromarray(noise), "JPEG")
    for fit, reference in steps.items():
        values = {**SMALL.model_dump(), "fit": fit, "interpolation": kind, "exact": True}
        got = evaluation_image(data, Transform.model_validate(values))
        assert np.array_equal(got, v2.Compose([*reference, v2.PILToTensor()])(Image.open(io.BytesIO(data))).numpy())


def test_a_padded_image_is_zero_where_nothing_is() -> None:
    transform = Transform(size=28, fit="pad")
    got = torch.from_numpy(evaluation_image(encoded(picture(20, 60)), transform))[None]
    there = normalize(got, transform, torch.device("cpu"))[0]
    assert there[:, :, :9].abs().max() < 0.01
    assert there[:, :, 19:].abs().max() < 0.01
    assert (there[:, :, 9:19].abs() > 0.05).float().mean() > 0.8


FITS: list[Literal["crop", "pad", "squash"]] = ["crop", "pad", "squash"]


@pytest.mark.parametrize("fit", FITS)
def test_random_parts_lie_where_the_picture_is(fit: Literal["crop", "pad", "squash"]) -> None:
    transform = Transform(size=28, resize=32, fit=fit, scale=(0.05, 1.0))
    rng = random.Random(0)
    for width, height in [(1, 5000), (5000, 1), (60, 200), (200, 60), (50, 50)]:
        whole = whole_box(width, height, transform) if fit == "pad" else (0, 0, width, height)
        boxes = np.array([random_box(width, height, transform, rng) for _ in range(500)])
        assert (boxes[:, :2] >= np.array(whole[:2]) - 1e-6).all()
        assert (boxes[:, 2:] <= np.array(whole[2:]) + 1e-6).all()
        left, top = np.maximum(boxes[:, :2], 0).T
        right, bottom = np.minimum(boxes[:, 2:], (width, height)).T
        sides = np.minimum(boxes[:, 2:] - boxes[:, :2], (width, height))
        np.testing.assert_allclose(
            np.stack([right - left, bottom - top], axis=1), sides
        )  # as much of it as there can be
    if fit == "squash":
        wide = np.array([random_box(200, 50, transform, rng) for _ in range(500)])
        ratio = (wide[:, 2] - wide[:, 0]) / (wide[:, 3] - wide[:, 1])
        assert ratio.min() > 2.8  # from 3/4 to 4/3 of 4, the picture's own
        assert ratio.max() < 5.5


def test_a_tall_drawing_keeps_its_subject() -> None:
    image = Image.new("RGB", (40, 200), "white")
    image.paste("red", (0, 0, 40, 20))
    image.paste("blue", (0, 180, 40, 200))
    for fit, both in (("crop", False), ("pad", True), ("squash", True)):
        got = evaluation_image(encoded(image), Transform.model_validate({"size": 40, "resize": 40, "fit": fit}))
        assert ([255, 0, 0] in got[:, :, 20].T.tolist(), [0, 0, 255] in got[:, :, 20].T.tolist()) == (both, both)


def test_a_fit_at_its_default_changes_no_fingerprint() -> None:
    assert Transform(fit="crop", interpolation="bilinear").deciding() == {}
    assert Transform(fit="pad", interpolation="bicubic").deciding() == {"fit": "pad", "interpolation": "bicubic"}


def test_an_image_of_the_networks_size_is_untouched() -> None:
    image = picture(28, 28)
    got = evaluation_image(encoded(image), Transform(size=28, resize=28))
    assert np.array_equal(got, np.asarray(image).transpose(2, 0, 1))


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same() -> None:
    image = picture(1600, 1200)
    data = encoded(image, "JPEG", quality=95)
    assert decode(data, SMALL).shape == (150, 200, 3)
    reference = v2.Compose([v2.Resize(32), v2.CenterCrop(28), v2.PILToTensor()])(image).numpy()
    assert difference(evaluation_image(data, SMALL), reference) <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    image = picture(90, 60)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "JPEG", quality=98, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert difference(decode(data, SMALL), np.asarray(upright)) == 0
    reference = v2.Compose([v2.Resize(32), v2.CenterCrop(28), v2.PILToTensor()])(upright).numpy()
    assert difference(evaluation_image(data, SMALL), reference) <= 1


MODES = {
    "PNG": ("1", "L", "P", "LA", "RGBA", "I;16", "RGB"),
    "JPEG": ("1", "L", "CMYK", "RGB"),
    "TIFF": ("1", "L", "P", "LA", "PA", "RGBA", "CMYK", "I;16", "RGB"),
    "GIF": ("1", "L", "P", "LA", "RGBA", "RGB"),
    "WEBP": ("1", "L", "P", "LA", "PA", "RGBA", "CMYK", "RGB"),
    "BMP": ("1", "L", "P", "RGBA", "RGB"),
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_every_mode_becomes_rgb(kind: str, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray((np.asarray(picture(40, 40).convert("L")).astype(np.uint16) << 8) + 77)
    else:
        image = picture(40, 40).convert(mode)
    data = encoded(image, kind)
    got = decode(data, SMALL)
    assert got.shape == (40, 40, 3)
    gray = np.asarray(picture(40, 40).convert("L")).astype(int)
    away = np.asarray(Image.fromarray(got).convert("L")).astype(int) - gray
    assert abs(away.mean()) < 10  # dithering keeps the average alone
    if mode != "1":
        assert np.abs(away).mean() < 30


def test_transparent_pixels_are_shown_on_white() -> None:
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((10, 20, 30, 255), (0, 0, 20, 10))
    got = decode(encoded(image), SMALL)
    assert got[5, 5].tolist() == [10, 20, 30]
    assert got[15, 5].tolist() == [255, 255, 255]


def test_an_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, SMALL)[8, 8].tolist() == [255, 0, 0]


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is large and holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404 Not Found</html>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
        (png_header(60_000, 60_000), "too_large"),
        (encoded(picture(200, 200), "JPEG")[:1500], "truncated"),
        (encoded(picture(200, 200))[:2000], "truncated"),
    ],
    ids=["empty", "html", "postscript", "bomb", "cut jpeg", "cut png"],
)
def test_what_cannot_be_used_has_a_reason(data: bytes, reason: str) -> None:
    uses: list[Callable[[], object]] = [
        lambda: decode(data, SMALL),
        lambda: evaluation_image(data, SMALL),
        lambda: training_image(data, SMALL, random.Random(0)),
    ]
    for use in uses:
        with pytest.raises(UndecodableImage) as caught:
            use()
        assert caught.value.reason == reason
        assert "\n" not in caught.value.detail
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.reason, again.detail) == (caught.value.reason, caught.value.detail)


def outcome(data: bytes) -> str:
    try:
        assert evaluation_image(data, SMALL).shape == (3, 28, 28)
    except UndecodableImage as error:
        return error.reason
    return "decoded"


def test_damaged_bytes_never_raise_anything_else() -> None:
    rng = random.Random(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"):
        whole = encoded(picture(50, 40), kind)
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(rng.randint(1, 20)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            if rng.random() < 0.3:
                damaged = damaged[: rng.randrange(len(damaged))]
            assert outcome(bytes(damaged)) in {"decoded", *REASONS}


def test_the_pixel_limit_counts_the_header_not_the_crop() -> None:
    data = encoded(picture(101, 100))
    assert evaluation_image(data, Transform(size=28, resize=32, max_pixels=10_100)).shape == (3, 28, 28)
    with pytest.raises(UndecodableImage, match="101 x 100 pixels, at most 10099"):
        evaluation_image(data, Transform(size=28, resize=32, max_pixels=10_099))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("width", "height"), [(1, 40_000), (40_000, 1), (1, 5000), (5000, 1), (1, 1), (2, 9)])
def test_an_extreme_shape_costs_no_more_than_its_output(
    width: int, height: int, fit: Literal["crop", "pad", "squash"]
) -> None:
    crops: list[Literal["random_resized", "pad", "none"]] = ["random_resized", "pad", "none"]
    for kind in ("PNG", "JPEG"):
        data = encoded(Image.new("RGB", (width, height), (9, 8, 7)), kind)
        for crop in crops:
            transform = Transform(size=224, resize=256, crop=crop, fit=fit)
            seen = evaluation_image(data, transform)
            exact = evaluation_image(data, transform.model_copy(update={"exact": True}))
            assert difference(exact[:, 112, 112], np.array([9, 8, 7])) <= 2
            assert difference(seen[:, 112, 112], np.array([9, 8, 7])) <= 2
            trained = [training_image(data, transform, random.Random(seed)) for seed in range(5)]
            assert all(image.shape == (3, 224, 224) for image in trained)
            assert all((image[2] < 12).any() for image in trained)  # not the padding alone
    if fit == "pad" and (width, height) == (1, 5000):
        assert [int(column.max()) for column in seen[2].T].count(int(seen[2, 0, 112])) == 1


def test_a_hostile_exif_says_nothing_on_the_terminal(tmp_path: Path) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\xff\xff\xff\xff\0\0\0\0" * 40
    (tmp_path / "image.jpg").write_bytes(encoded(picture(40, 40), "JPEG", exif=exif))
    code = (
        "import sys; from models.config import Transform; from models.inputs.image import evaluation_image;"
        "print(evaluation_image(open(sys.argv[1], 'rb').read(), Transform(size=28, resize=32)).shape, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "image.jpg")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert (done.stdout, done.stderr) == ("(3, 28, 28) False\n", "")


@pytest.mark.parametrize("crop", ["random_resized", "pad", "none"])
def test_training_images_follow_the_generator(crop: Literal["random_resized", "pad", "none"]) -> None:
    data = encoded(picture(60, 50))
    transform = Transform(size=28, resize=32, crop=crop, padding=4)
    images = [training_image(data, transform, random.Random(seed)) for seed in (1, 1, 2, 3, 4, 5)]
    assert np.array_equal(images[0], images[1])
    assert len({image.tobytes() for image in images}) == (2 if crop == "none" else 5)
    assert all(image.shape == (3, 28, 28) and image.flags.c_contiguous for image in images)


def test_pad_moves_the_evaluation_image_and_flip_mirrors_it() -> None:
    data = encoded(picture(28, 28))
    transform = Transform(size=28, resize=28, crop="pad", padding=4, flip=False)
    padded = np.pad(evaluation_image(data, transform), ((0, 0), (4, 4), (4, 4)))
    windows = {padded[:, y : y + 28, x : x + 28].tobytes() for y in range(9) for x in range(9)}
    rng = random.Random(0)
    seen = {training_image(data, transform, rng).tobytes() for _ in range(600)}
    assert seen <= windows
    assert len(seen) > 70
    still = Transform(size=28, resize=28, crop="none")
    whole = evaluation_image(data, still)
    assert {training_image(data, still, rng).tobytes() for _ in range(50)} == {
        whole.tobytes(),
        np.ascontiguousarray(whole[:, :, ::-1]).tobytes(),
    }


def test_random_boxes_have_torchvisions_distribution() -> None:
    transform = Transform(size=28, resize=32, scale=(0.2, 0.9))
    rng = random.Random(0)
    torch.manual_seed(0)
    ours = np.array([random_box(100, 60, transform, rng) for _ in range(4000)])
    reference = v2.RandomResizedCrop(28, (0.2, 0.9))
    made = [reference.make_params([torch.zeros(3, 60, 100)]) for _ in range(4000)]
    theirs = np.array([[p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"]] for p in made])
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 1.5
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 1.5
    assert ours.min() >= 0
    assert ours[:, 2].max() <= 100
    assert ours[:, 3].max() <= 60


def test_normalize_is_torchvisions() -> None:
    transform = Transform(size=28, resize=32)
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(transform.mean, transform.std)])(images)
    got = normalize(images, transform, torch.device("cpu"))
    torch.testing.assert_close(got, reference)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"size": 28, "resize": 256}, "resize = 256 must be from size"),
        ({"size": 32, "resize": 28}, "resize = 28 must be from size"),
        ({"scale": [0.9, 0.1]}, "smallest, largest"),
        ({"size": 8, "resize": 8, "crop": "pad", "padding": 5}, "padding = 5 must be at most 4"),
        ({"std": [0.0, 1.0, 1.0]}, "greater than 0"),
        ({"crop": "center"}, "random_resized"),
    ],
)
def test_a_transform_that_cannot_be_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Transform.model_validate(values)


def test_corners_are_of_the_crop_alone() -> None:
    five = Score(views="five")
    check_views(SMALL, five)
    for fit, said in (("pad", "transform.fit is pad"), ("squash", "transform.fit is squash")):
        with pytest.raises(RecipeError, match=said):
            check_views(Transform.model_validate({"size": 28, "resize": 32, "fit": fit}), five)


def test_the_shorter_side_follows_the_size() -> None:
    assert Transform(size=112).resize == 128
    assert Transform.model_validate({"size": Plain("56")}).resize == 64
    assert Transform(size=112, resize=112).resize == 112
    assert Transform().resize == 256
