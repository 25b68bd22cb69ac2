from collections import Counter

import numpy as np
import PIL
import pytest
from PIL import Image

from sda_fast.data import Item, load_image, noise_image
from sda_fast.data import images as images_module
from sda_fast.data.images import bounded_size


def item_with(tmp_path, image, name="a.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return Item("a", {}, path)


def gradient(width, height):
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "size",
    [(1, 1), (19, 19), (20, 20), (100, 50), (256, 256), (257, 256), (4000, 30), (30, 4000), (5, 2000), (1, 5000)],
)
def test_sizes_lie_between_the_bounds_and_keep_their_shape(size):
    width, height = bounded_size(*size, 400, 65536)
    assert width * height <= 65536
    assert width * height >= 400
    assert max(width / height, height / width) <= 105
    if 1 / 100 <= size[0] / size[1] <= 100:
        assert width / height == pytest.approx(size[0] / size[1], rel=0.06)
        if 400 <= size[0] * size[1] <= 65536:
            assert (width, height) == size


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (1000, 700)])
def test_load_image_bounds_the_area(tmp_path, size):
    picture, is_noise = load_image(item_with(tmp_path, gradient(*size)), min_pixels=400, max_pixels=65536)
    assert not is_noise
    assert picture.mode == "RGB"
    assert picture.size == bounded_size(*size, 400, 65536)


def test_a_picture_within_the_bounds_is_unchanged(tmp_path):
    original = gradient(50, 40)
    picture, _ = load_image(item_with(tmp_path, original))
    assert np.array_equal(np.asarray(picture), np.asarray(original))


def test_bad_bounds_are_refused():
    with pytest.raises(ValueError, match="got 10 and 5"):
        load_image(Item("a", {}), min_pixels=10, max_pixels=5)


OLD_PILLOW = int(PIL.__version__.split(".")[0]) < 13
YCBCR = pytest.param(
    "YCbCr", marks=pytest.mark.skipif(OLD_PILLOW, reason="Pillow before 13 does not read such a TIFF to its end")
)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", YCBCR, "I;16", "I", "F"])
def test_every_mode_becomes_rgb_and_keeps_light_and_dark(tmp_path, mode):
    ramp = np.tile(np.linspace(0, 255, 64)[None, :], (64, 1))
    if mode in ("I;16", "I"):
        image = Image.fromarray((ramp * 257).astype(np.uint16 if mode == "I;16" else np.int32))
    elif mode == "F":
        image = Image.fromarray(ramp.astype(np.float32))
    else:
        image = (
            Image.fromarray(ramp.astype(np.uint8))
            .convert("RGB" if mode in ("CMYK", "YCbCr", "P") else "L")
            .convert(mode)
        )
    picture, is_noise = load_image(item_with(tmp_path, image, "a.tiff"))
    grey = np.asarray(picture.convert("L")).astype(float)
    assert not is_noise and picture.mode == "RGB"
    assert grey[:, :16].mean() < 60 and grey[:, 48:].mean() > 195


def test_transparency_is_put_on_white(tmp_path):
    picture, _ = load_image(item_with(tmp_path, Image.new("RGBA", (32, 32), (0, 0, 0, 0))))
    assert np.asarray(picture).min() == 255


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (60, 30), "black")
    image.paste("white", (0, 0, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture, _ = load_image(item_with(tmp_path, image, "a.jpg", exif=exif))
    pixels = np.asarray(picture.convert("L"))
    assert picture.size == (30, 60)
    assert pixels[:25].mean() > 200 > 50 > pixels[35:].mean()


def test_first_frame_of_an_animation_is_used(tmp_path):
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("red", "blue")]
    picture, _ = load_image(item_with(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:]))
    assert picture.getpixel((5, 5)) == (255, 0, 0)


def test_large_jpeg_is_close_to_the_same_picture(tmp_path):
    picture, _ = load_image(item_with(tmp_path, gradient(2000, 1500), "a.jpg", quality=95))
    expected = gradient(2000, 1500).resize(picture.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int)).mean() < 3


def broken_files(tmp_path):
    gradient(200, 200).save(tmp_path / "whole.png")
    gradient(200, 200).save(tmp_path / "whole.jpg")
    png, jpeg = (tmp_path / "whole.png").read_bytes(), (tmp_path / "whole.jpg").read_bytes()
    return {
        "empty": b"",
        "text": b"<html>404</html>",
        "half a png": png[: len(png) // 2],
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "header only": png[:30],
        "bits flipped": png[:60] + bytes(255 - byte for byte in png[60:90]) + png[90:],
    }


@pytest.mark.parametrize("kind", ["empty", "text", "half a png", "half a jpeg", "header only", "bits flipped"])
def test_broken_pictures_become_noise_and_are_counted(tmp_path, caplog, kind):
    (tmp_path / "a.jpg").write_bytes(broken_files(tmp_path)[kind])
    counted = Counter()
    picture, is_noise = load_image(Item("x", {}, tmp_path / "a.jpg"), seed=3, warnings=counted)
    assert is_noise
    assert counted == {"broken_image": 1}
    assert "item x: broken_image" in caplog.text and str(tmp_path / "a.jpg") in caplog.text
    assert np.array_equal(np.asarray(picture), np.asarray(noise_image("x", 3)))


def test_missing_pictures_become_noise(tmp_path):
    counted = Counter()
    for image in (None, tmp_path / "nothing.png", tmp_path):
        assert load_image(Item("x", {}, image), warnings=counted)[1]
    assert counted == {"missing_image": 1, "image_not_found": 2}


def test_too_large_pictures_are_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "MAX_SOURCE_PIXELS", 1000)
    counted = Counter()
    assert load_image(item_with(tmp_path, gradient(40, 40)), warnings=counted)[1]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert load_image(item_with(tmp_path, gradient(40, 40)), warnings=counted)[1]
    assert counted == {"oversized_image": 2}


def test_unreadable_files_are_errors_not_noise(tmp_path, monkeypatch):
    item = item_with(tmp_path, gradient(30, 30))

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(item.image), "read_bytes", refuse)
    with pytest.raises(PermissionError):
        load_image(item)


def test_noise_depends_on_item_and_seed_only():
    pixels = np.asarray(noise_image("a", 1))
    assert np.array_equal(pixels, np.asarray(noise_image("a", 1)))
    assert not np.array_equal(pixels, np.asarray(noise_image("a", 2)))
    assert not np.array_equal(pixels, np.asarray(noise_image("b", 1)))
    assert pixels[0, 0].tolist() == [27, 173, 119]
    counts = np.bincount(pixels.ravel(), minlength=256)
    # Chi-squared with 255 degrees of freedom: mean 255, deviation 22.6.
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 255 + 6 * 22.6


def test_noise_obeys_the_bounds():
    picture, _ = load_image(Item("x", {}), max_pixels=1000)
    assert picture.size == (31, 31)
