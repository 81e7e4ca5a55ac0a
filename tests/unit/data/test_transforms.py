"""Decoding of awkward images, and transforms that are functions of their arguments alone."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from isthmus.data.transforms import DecodeError, ImageTransform, clean_caption, decode_image


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
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(DecodeError, match="larger than the limit"):
        decode_image(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    with pytest.raises(DecodeError, match="40x30 pixels is larger than the limit of 1000"):
        decode_image(encoded(noise(), "PNG"), max_pixels=1000)


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
