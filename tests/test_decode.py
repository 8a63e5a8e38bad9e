"""Pictures decoded at the size needed: nearly the pixels of the plain way, whatever the file."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from corpora import jpeg
from PIL import Image, ImageOps
from test_images import png_header
from transformers import CLIPImageProcessorPil

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.handwriting.scenes import generator
from aimv2_mllm.data.pictures.decode import ASPECT, Box, decode, middle_square, random_crop


def landscape(width: int = 640, height: int = 480) -> Image.Image:
    """A picture with structure at all scales and no symmetry."""
    random = np.random.default_rng(3)
    sides = (4, 16, 64)
    picture = np.zeros((height, width, 3), dtype=np.float32)
    for side in sides:
        for channel in range(3):
            coarse = Image.fromarray(random.normal(0, 128 / side**0.5, (side, side)).astype("f"))
            picture[..., channel] += np.asarray(coarse.resize((width, height)))
    return Image.fromarray((picture + 128).clip(0, 255).astype(np.uint8))


def plainly(picture: Image.Image, size: int, box: Box) -> np.ndarray:
    left, top, width, height = map(int, box)
    part = picture.crop((left, top, left + width, top + height))
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def at(box: Box) -> Callable[[int, int], Box]:
    return lambda width, height: box


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours.astype(int) - theirs.astype(int)).mean())


BOXES = [Box(0, 0, 640, 480), Box(80, 0, 480, 480), Box(201, 113, 300, 260), Box(7, 5, 90, 70)]


@pytest.mark.parametrize("size", [28, 56, 112])
@pytest.mark.parametrize("box", BOXES)
def test_a_jpeg_at_the_size_needed_has_nearly_the_pixels_of_the_whole(box: Box, size: int) -> None:
    content = jpeg(landscape(), quality=95)
    whole = Image.open(io.BytesIO(content)).convert("RGB")
    assert difference(decode(content, size, at(box)), plainly(whole, size, box)) < 3
    # The bound tells pictures apart: half a crop's shift is far above it.
    shifted = Box(box.left * 0.5, box.top, box.width * 0.9, box.height)
    assert difference(decode(content, size, at(shifted)), plainly(whole, size, box)) > 6


@pytest.mark.parametrize("box", BOXES)
def test_another_format_has_exactly_the_pixels_of_the_whole(box: Box) -> None:
    content = saved(landscape(), "PNG")
    assert difference(decode(content, 56, at(box)), plainly(landscape(), 56, box)) == 0


@pytest.mark.parametrize(
    ("side", "scale"), [(640, 1), (319, 2), (320, 2), (160, 4), (80, 8), (20, 8)]
)
def test_a_jpeg_is_decoded_no_larger_than_it_must_be(
    monkeypatch: pytest.MonkeyPatch, side: int, scale: int
) -> None:
    from aimv2_mllm.data.pictures import decode as module

    sizes = []

    def seen(picture: Image.Image) -> Image.Image:
        sizes.append(picture.size)
        return picture

    monkeypatch.setattr(module, "upright", seen)
    content = jpeg(Image.new("RGB", (640, 640), "red"))
    decode(content, side, middle_square)
    assert sizes == [(640 // scale, 640 // scale)]


def test_a_jpeg_on_its_side_is_decoded_as_large_as_an_upright_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from aimv2_mllm.data.pictures import decode as module

    sizes = []

    def seen(picture: Image.Image) -> Image.Image:
        sizes.append(picture.size)
        return ImageOps.exif_transpose(picture)

    monkeypatch.setattr(module, "upright", seen)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = jpeg(Image.new("RGB", (640, 320)), exif=exif)  # upright 320 wide, 640 high
    decode(content, 40, at(Box(0, 0, 80, 640)))
    assert sizes == [(320, 160)]  # half: the part is 40 wide then


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_picture_stands_upright_before_it_is_cropped(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} | ({"lossless": True} if kind == "WEBP" else {})
    content = saved(landscape(), kind, **options)
    whole = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    box = Box(20, 110, 400, 310)
    asked: list[tuple[int, int]] = []

    def choose(width: int, height: int) -> Box:
        asked.append((width, height))
        return box

    assert difference(decode(content, 56, choose), plainly(whole, 56, box)) < 3
    assert asked == [whole.size]


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (500, 500)])
def test_the_middle_square_is_what_the_clip_processor_cuts(size: tuple[int, int]) -> None:
    picture = landscape(*size)
    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_normalize=False
    )(picture, return_tensors="np")["pixel_values"][0]
    ours = decode(saved(picture, "PNG"), 56, middle_square)
    # It resizes first and cuts at whole pixels then: up to half a pixel beside ours.
    assert difference(ours, (theirs * 255).round().transpose(1, 2, 0)) < 3


def test_every_kind_of_picture_becomes_rgb() -> None:
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    steps = np.full((64, 64), 200, dtype=np.int32)
    steps[32:] = 60_000
    animation = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "blue")]
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.paste(1, (32, 0, 64, 64))
    more: dict[str, Any] = {"save_all": True, "append_images": animation[1:]}
    files = {
        "cmyk": jpeg(Image.new("CMYK", (64, 64), (0, 255, 255, 0))),
        "deep": saved(Image.fromarray(grey.astype(np.uint16)), "PNG"),
        "deep, a dark part": saved(Image.fromarray(grey.astype(np.int32)), "TIFF"),
        "deep, black to 8 bits": saved(Image.fromarray(steps), "TIFF"),
        "palette": saved(palette, "PNG", transparency=0),
        "gif": saved(animation[0], "GIF", **more),
        "webp": saved(animation[0], "WEBP", lossless=True, **more),
        "grey": jpeg(Image.new("L", (64, 64), 100)),
        "clear": saved(Image.new("RGBA", (64, 64), (0, 0, 0, 0)), "WEBP", lossless=True),
    }
    left = Box(0, 0, 32, 32)
    mean = {
        name: decode(content, 16, at(left)).reshape(-1, 3).mean(0).round().tolist()
        for name, content in files.items()
    }
    red, green, blue = mean.pop("cmyk")
    assert red > 240
    assert max(green, blue) < 20
    dark = round(float((grey[:32, :32] / 257).mean()))
    for name in ("deep", "deep, a dark part"):
        assert np.abs(np.array(mean.pop(name)) - dark).max() <= 1
    assert mean == {
        "deep, black to 8 bits": [0, 0, 0],
        "palette": [255, 255, 255],
        "gif": [255, 0, 0],
        "webp": [255, 0, 0],
        "grey": [100, 100, 100],
        "clear": [255, 255, 255],
    }


REFUSED = {
    "a text named .jpg": (b"this is a letter", "undecodable"),
    "nothing": (b"", "undecodable"),
    "a cut JPEG": (jpeg(landscape())[:5000], "undecodable"),
    "a cut PNG": (saved(landscape(), "PNG")[:5000], "undecodable"),
    "a huge PNG": (png_header(30_000, 30_000), "too_large"),
    "a large PNG": (png_header(8001, 8000), "too_large"),
    "PostScript, for which Pillow would start a program": (b"%!PS-Adobe-3.0 EPSF\n", "undecodable"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_picture_is_unusable_and_says_why(name: str) -> None:
    content, reason = REFUSED[name]
    with pytest.raises(Unusable) as error:
        decode(content, 28, middle_square)
    assert error.value.reason == reason


def test_random_crops_have_the_areas_and_aspects_of_the_paper() -> None:
    width, height = 400, 300
    boxes = [random_crop(width, height, generator(0, "crop", i)) for i in range(500)]
    areas = np.array([box.width * box.height for box in boxes]) / (width * height)
    aspects = np.array([box.width / box.height for box in boxes])
    assert 0.39 < areas.min() < 0.43
    assert 0.95 < areas.max() <= 1
    assert ASPECT[0] - 0.01 <= aspects.min() < 0.8
    assert 1.28 < aspects.max() <= ASPECT[1] + 0.01
    for box in boxes:
        assert min(box.left, box.top) >= 0
        assert box.left + box.width <= width
        assert box.top + box.height <= height
    assert len({(box.left, box.top) for box in boxes}) > 450


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1, 1), (3, 1), (1, 7)])
def test_a_strip_gives_the_largest_crop_whose_aspect_is_allowed(size: tuple[int, int]) -> None:
    box = random_crop(*size, generator(0, 0))
    assert min(box) >= 0
    assert min(box.width, box.height) >= 1
    assert box.left + box.width <= size[0]
    assert box.top + box.height <= size[1]
    if min(size) == 10:
        assert (min(box.width, box.height), max(box.width, box.height)) == (10, 13)
    assert decode(saved(Image.new("RGB", size), "PNG"), 14, at(box)).shape == (14, 14, 3)
