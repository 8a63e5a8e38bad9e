"""Pictures from files, and how they become pixels: nothing lost or clipped, bad ones refused."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from aimv2_mllm.data.pictures import images
from aimv2_mllm.data.pictures.images import open_image, square
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.preprocessing import PREPROCESSOR_FILE, Preprocessing


def png_header(width: int, height: int) -> bytes:
    """A grey PNG of that size with the body of one pixel: it opens, and cannot be decoded."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def saved(picture: Image.Image, path: Path, **options: object) -> Path:
    picture.save(path, **options)  # type: ignore[arg-type]
    return path


def pixels(picture: Image.Image) -> list[list[tuple[int, ...]]]:
    return [[tuple(map(int, p)) for p in row] for row in np.asarray(picture)]


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_a_sound_picture_with_broken_exif_is_taken_as_it_lies(tmp_path: Path, exif: bytes) -> None:
    path = tmp_path / "picture.jpg"
    Image.new("RGB", (8, 4), "red").save(path, exif=exif)
    assert open_image(path).size == (8, 4)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (2, 1), "white")
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = open_image(saved(picture, tmp_path / "turned.png", exif=exif))
    assert pixels(turned) == [[(255, 0, 0)], [(255, 255, 255)]]


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 255, 255))
    opened = open_image(saved(picture, tmp_path / "clear.png"))
    assert pixels(opened) == [[(255, 255, 255), (0, 0, 255)]]


def test_a_transparent_colour_of_a_palette_is_white(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([10, 20, 30, 200, 0, 0])
    picture.putpixel((1, 0), 1)
    opened = open_image(saved(picture, tmp_path / "palette.png", transparency=0))
    assert pixels(opened) == [[(255, 255, 255), (200, 0, 0)]]


@pytest.mark.parametrize("brightest", [65535, 200])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, brightest: int) -> None:
    values = np.array([[0, brightest // 2, brightest]], dtype=np.uint16)
    opened = open_image(saved(Image.fromarray(values), tmp_path / "deep.png"))
    expected = (values // 257).tolist()[0]
    assert [p[0] for p in pixels(opened)[0]] == expected


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    picture = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = pixels(open_image(saved(picture, tmp_path / "print.jpg")))[8][8]
    assert red > 240
    assert green < 20
    assert blue < 20


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "I", "F", "I;16", "CMYK"])
def test_every_mode_opens_as_rgb(tmp_path: Path, mode: str) -> None:
    opened = open_image(saved(Image.new(mode, (3, 2)), tmp_path / "picture.tiff"))
    assert (opened.mode, opened.size) == ("RGB", (3, 2))


def cut_png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return buffer.getvalue()[:1000]


def cut_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    return buffer.getvalue()[:1000]


REFUSED = {
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture"),
    "text": (b"this is a letter", "is not a picture"),
    "empty": (b"", "is not a picture"),
    "cut_png": (cut_png(), "damaged or cut off"),
    "cut_jpeg": (cut_jpeg(), "damaged or cut off"),
    "too_large": (png_header(8001, 8000), "8,001 x 8,000 pixels"),
    "huge": (png_header(30_000, 30_000), "pixels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_picture_is_refused(tmp_path: Path, name: str) -> None:
    content, why = REFUSED[name]
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        open_image(path)
    assert str(error.value).startswith(f"{path}: ")
    assert why in str(error.value)


def test_the_limit_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 6)
    assert open_image(saved(Image.new("L", (3, 2)), tmp_path / "fits.png")).size == (3, 2)
    with pytest.raises(UsageError, match="7 x 1 pixels, and 6 are the most"):
        open_image(saved(Image.new("L", (7, 1)), tmp_path / "not.png"))


def test_a_missing_picture_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such picture"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(UsageError, match="is a folder"):
        open_image(tmp_path)


@pytest.mark.parametrize("size", [(9, 4), (4, 9), (5, 5), (1, 7)])
def test_square_cuts_nothing_off_and_scales_nothing(size: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    whole = np.asarray(square(Image.fromarray(rows)))
    side = max(size)
    assert whole.shape == (side, side, 3)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    found = [
        np.array_equal(whole[t : t + size[1], le : le + size[0]], rows)
        for t in {top, side - size[1] - top}
        for le in {left, side - size[0] - left}
    ]
    assert any(found)


def test_the_rim_has_the_colour_of_most_of_the_edge() -> None:
    picture = Image.new("RGB", (8, 4), (10, 200, 30))
    picture.putpixel((0, 0), (255, 255, 255))
    assert pixels(square(picture))[0][0] == (10, 200, 30)


def test_a_long_strip_does_not_become_a_huge_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_SQUARE_SIDE", 40)
    assert square(Image.new("RGB", (400, 2))).size == (40, 40)
    assert square(Image.new("RGB", (1, 400))).size == (40, 40)


def noise(count: int = 2, size: int = 28) -> np.ndarray:
    shape = (count, size, size, 3)
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def test_pixels_survive_the_round_trip() -> None:
    preprocessing = Preprocessing(28)
    assert np.array_equal(preprocessing.restore(preprocessing.normalise(noise())), noise())


def test_pixels_are_what_the_clip_processor_makes_of_them() -> None:
    preprocessing = Preprocessing(28, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_mean=list(preprocessing.mean),
        image_std=list(preprocessing.std),
    )([Image.fromarray(rows) for rows in noise()], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preprocessing.normalise(noise()), theirs, atol=1e-5, rtol=0)


def test_a_saved_preprocessing_loads_equal_and_as_a_clip_processor(tmp_path: Path) -> None:
    preprocessing = Preprocessing(28, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    preprocessing.save(tmp_path)
    assert Preprocessing.load(tmp_path) == preprocessing
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path)
    pictures = [Image.fromarray(rows) for rows in noise()]
    made = theirs(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preprocessing.normalise(noise()), made, atol=1e-5, rtol=0)


def test_a_preprocessing_that_says_too_little_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no preprocessor_config"):
        Preprocessing.load(tmp_path)
    (tmp_path / PREPROCESSOR_FILE).write_text('{"image_mean": [0, 0, 0]}')
    with pytest.raises(UsageError, match="is not an image processor's"):
        Preprocessing.load(tmp_path)
