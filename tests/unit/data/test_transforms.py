"""Decoding of awkward images, and transforms that are functions of their arguments alone."""

import contextlib
import io
import pickle
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from isthmus.data import transforms
from isthmus.data.transforms import DecodeError, ImageTransform, clean_caption, decode_image

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_alpha_is_laid_onto_white() -> None:
    data = encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG")
    assert decode_image(data).getpixel((0, 0)) == (255, 255, 255)
    half = decode_image(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG")).getpixel((1, 1))
    assert half == (127, 127, 127)


def test_palette_with_transparency_is_white_there() -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert decode_image(encoded(image, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_greys_keep_their_scale() -> None:
    image = Image.fromarray(np.full((3, 3), 32768, dtype=np.uint16))
    assert decode_image(encoded(image, "PNG")).getpixel((0, 0)) == (128, 128, 128)


def test_cmyk_becomes_rgb() -> None:
    decoded = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = decoded.getpixel((4, 4))
    assert decoded.mode == "RGB" and red > 200 and green < 60 and blue < 60


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate a quarter turn
    assert decode_image(encoded(noise(40, 30), "JPEG", exif=exif)).size == (30, 40)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_draft_mode_keeps_twice_the_size_that_is_needed() -> None:
    data = encoded(noise(1600, 1200), "JPEG")
    assert decode_image(data).size == (1600, 1200)
    drafted = decode_image(data, at_least=100)
    assert 200 <= min(drafted.size) < 1200


def test_a_bomb_is_refused_from_its_header() -> None:
    with pytest.raises(DecodeError, match="larger than the limit"):
        decode_image(png_header(60_000, 60_000))
    with pytest.raises(DecodeError, match="40x30 pixels is larger than the limit of 1000"):
        decode_image(encoded(noise(), "PNG"), max_pixels=1000)


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def test_limits_are_checked_before_pixels_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    webp = bytearray(encoded(noise(), "WEBP", save_all=True, append_images=[noise().rotate(180)]))
    webp[24:30] = (16382).to_bytes(3, "little") * 2  # the canvas that an animation's header names
    gif = bytearray(encoded(noise(), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    photo = encoded(noise(200, 200), "JPEG")
    small = encoded(noise(), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were asked for"))
    for data in (png_header(60_000, 700), bytes(webp), bytes(gif), photo):
        with pytest.raises(DecodeError, match="larger than the limit"):
            decode_image(data, max_pixels=30_000)
    monkeypatch.setattr(transforms, "MAX_BYTES", 100)
    with pytest.raises(DecodeError, match=r"the image of \d+ bytes is larger than the limit of 100"):
        decode_image(small)


def test_images_without_area_are_refused() -> None:
    gif = b"GIF89a" + struct.pack("<HH", 0, 0) + bytes(20)
    for data in (png_header(0, 5), png_header(5, 0), gif, b"P6 0 3 255\n"):
        with pytest.raises(DecodeError):
            decode_image(data)


@pytest.mark.parametrize("data", [EPS, b"8BPS" + bytes(30), b"\0\0\1\0\1\0" + bytes(30)])
def test_formats_that_run_programs_or_nest_images_are_not_opened(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program was started"))
    with pytest.raises(DecodeError, match="no image format that is known"):
        decode_image(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_an_image_cut_anywhere_is_refused(kind: str) -> None:
    data = encoded(noise(), kind)
    assert decode_image(data).size == (40, 30)
    for end in range(0, len(data) - 40, 37):
        with pytest.raises(DecodeError):
            decode_image(data[:end])
        with pytest.raises(DecodeError):
            decode_image(data[:end], at_least=4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_flipped_bytes_give_an_image_or_one_kind_of_error(kind: str) -> None:
    data, random = encoded(noise(), kind), np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(data)
        for place in random.integers(0, len(data), 4):
            broken[place] ^= int(random.integers(1, 256))
        with contextlib.suppress(DecodeError):
            assert decode_image(bytes(broken)).mode == "RGB"


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "TIFF"])
def test_first_frame_of_other_animations(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_orientation_and_scaled_decoding_together(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    marked = Image.new("RGB", (800, 400), "black")
    marked.paste("red", (0, 0, 200, 100))  # the corner at the upper left as stored
    more = {"save_all": True, "append_images": [marked]} if kind == "MPO" else {}
    data = encoded(marked, kind, exif=exif, **more)
    full, small = decode_image(data), decode_image(data, at_least=50)
    assert full.size == ((800, 400) if orientation == 3 else (400, 800))
    assert small.size[0] * 4 <= full.size[0] and min(small.size) >= 100
    corner = {3: (0.95, 0.95), 6: (0.95, 0.05), 8: (0.05, 0.95)}[orientation]
    for image in (full, small):
        red, green, _ = image.getpixel((int(corner[0] * image.width), int(corner[1] * image.height)))
        assert red > 200 and green < 60


@pytest.mark.parametrize(
    "exif",
    [b"garbage", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0", b""],
)
def test_an_orientation_that_cannot_be_read_is_upright(exif: bytes) -> None:
    data = encoded(noise(), "JPEG")
    body = b"Exif\0\0" + exif
    assert decode_image(data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]).size == (40, 30)


def test_deep_greys_by_their_own_white() -> None:
    def grey(values: np.ndarray, kind: str) -> int:
        return decode_image(encoded(Image.fromarray(values), kind)).getpixel((0, 0))[0]

    assert grey(np.full((3, 3), 200, np.uint16), "PNG") == 1, "nearly black: 200 of 65,535"
    assert grey(np.full((3, 3), 65535, np.uint16), "TIFF") == 255
    assert grey(np.full((3, 3), 0.5, np.float32), "TIFF") == 128
    assert grey(np.full((3, 3), 100.0, np.float32), "TIFF") == 100
    assert grey(np.full((3, 3), np.nan, np.float32), "TIFF") == 0


def test_other_modes() -> None:
    white = (255, 255, 255)
    assert decode_image(encoded(Image.new("1", (4, 4), 1), "PNG")).getpixel((0, 0)) == white
    assert decode_image(encoded(Image.new("LA", (4, 4), (9, 0)), "PNG")).getpixel((0, 0)) == white
    keyed = encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert decode_image(keyed).getpixel((0, 0)) == white
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    half = decode_image(encoded(palette, "PNG", transparency=bytes([255, 0])))
    assert [half.getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), white]


@pytest.mark.parametrize(
    "data", [b"", b"no image at all", encoded(noise(), "PNG")[:600], encoded(noise(), "JPEG")[:300]]
)
def test_damaged_bytes_raise_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_image(data)
    assert caught.value.reason


def test_evaluation_transform_is_resize_and_normalise() -> None:
    transform = ImageTransform(16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    pixels = transform(noise())
    assert pixels.dtype == np.float32 and pixels.shape == (3, 16, 16)
    resized = np.asarray(noise().resize((16, 16), Image.Resampling.BICUBIC), np.float64) / 255
    expected = (resized - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.25, 0.5])
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), atol=1e-5)


def test_augmentation_is_a_function_of_the_seed() -> None:
    transform = pickle.loads(pickle.dumps(ImageTransform(16)))
    first = transform.augment(noise(), 5)
    np.testing.assert_array_equal(first, ImageTransform(16).augment(noise(), 5))
    assert any(not np.array_equal(first, transform.augment(noise(), seed)) for seed in (6, 7))
    plain = ImageTransform(16, crop_scale=(1.0, 1.0), flip=False)
    square = noise(32, 32)  # the whole image is the only crop left, whatever the seed, unless the aspect is drawn away
    assert plain.augment(square, 1).shape == (3, 16, 16)


def test_digest_follows_every_field() -> None:
    digests = {
        ImageTransform(16).digest,
        ImageTransform(17).digest,
        ImageTransform(16, interpolation="bilinear").digest,
    }
    assert len(digests) == 3 and ImageTransform(16).digest == ImageTransform(16).digest


def test_captions_are_cleaned_as_the_seeds_do() -> None:
    assert clean_caption('  A "Dog"; (big!)  runs.  ') == "a dog big runs"
    assert clean_caption("x-ray, isn't it?") == "x-ray, isn't it?"
    assert clean_caption("w " * 80) == " ".join(["w"] * 50)
