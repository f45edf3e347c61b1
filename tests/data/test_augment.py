"""Augmentation: exact where it can be, a function of the generator alone, and of the sizes and ranges that the config says."""

import dataclasses
import io
import math

import numpy as np
import pytest
from PIL import Image

from jaxdistill.data import augment
from jaxdistill.data.images import ImageConfig
from jaxdistill.data.pictures import Corrupt, decode

PLAIN = ImageConfig(size=(24, 24))


def noise(height=24, width=24, channels=1, seed=0):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    return (127 + 60 * np.sin(x / 4) + 60 * np.cos(y / 5)).astype(np.uint8)


def trained(image, seed=0, **options):
    config = dataclasses.replace(PLAIN, channels=1 if image.ndim == 2 else 3, **options)
    return augment.training(Image.fromarray(image), config, np.random.default_rng(seed))


class Fixed:
    """A generator whose uniform numbers are set; `random` always hits, `integers` is the largest."""

    def __init__(self, *uniform):
        self.values = np.asarray(uniform)

    def uniform(self, low, high, count):
        assert (low, high, count) == (-1.0, 1.0, 5)
        return self.values

    def random(self):
        return 0.0

    def integers(self, high):
        return high - 1


@pytest.mark.parametrize("channels", [1, 3])
def test_without_augmentation_training_is_the_image_itself(channels):
    image = noise(channels=channels)
    for found in (trained(image), augment.centred(Image.fromarray(image), dataclasses.replace(PLAIN, channels=channels))):
        assert (found.shape, found.dtype) == ((24, 24, channels), np.uint8)
        np.testing.assert_array_equal(found, image.reshape(24, 24, channels))


def test_the_centre_is_cropped_from_the_resized_picture():
    image = smooth(64, 64)
    config = dataclasses.replace(PLAIN, resize=(32, 40))
    wanted = np.asarray(Image.fromarray(image).resize((40, 32), Image.Resampling.BILINEAR))[4:28, 8:32]
    np.testing.assert_array_equal(augment.centred(Image.fromarray(image), config)[..., 0], wanted)


def test_random_crops_reach_every_offset_and_nothing_else():
    image = np.arange(26 * 25, dtype=np.int64).reshape(26, 25) % 251
    image = image.astype(np.uint8)
    windows = {image[y : y + 24, x : x + 24].tobytes() for y in range(3) for x in range(2)}
    found = {trained(image, seed, resize=(26, 25)).tobytes() for seed in range(80)}
    assert found == windows


def test_half_of_the_images_are_flipped_exactly():
    image = noise(channels=3)
    found = [trained(image, seed, flip=True) for seed in range(200)]
    flipped = [np.array_equal(each, image[:, ::-1]) for each in found]
    assert all(each or np.array_equal(image, other) for each, other in zip(flipped, found, strict=True))
    assert 70 < sum(flipped) < 130


@pytest.mark.parametrize("turns", [1, -1])
def test_a_rotation_by_90_degrees_is_a_rotation_of_the_pixels(turns):
    """Image y points down: a positive angle takes the output's right from below, which turns the picture against the clock."""
    config = dataclasses.replace(PLAIN, rotate=90.0)
    image = noise()
    found = augment.training(Image.fromarray(image), config, Fixed(turns, 0, 0, 0, 0))[..., 0]
    assert np.abs(found.astype(int) - np.rot90(image, turns)).max() <= 1


def test_a_warp_by_nothing_and_a_shift_by_pixels_are_exact():
    image = noise()
    config = dataclasses.replace(PLAIN, rotate=30.0, zoom=0.5, shear=20.0, shift=0.25)
    np.testing.assert_array_equal(augment.training(Image.fromarray(image), config, Fixed(0, 0, 0, 0, 0))[..., 0], image)
    found = augment.training(Image.fromarray(image), config, Fixed(0, 1, -0.5, 0, 0))[..., 0]  # 6 to the left, 3 down
    np.testing.assert_array_equal(found[3:, :18], image[:21, 6:])
    fill = augment._border(Image.fromarray(image))
    assert (found[:3] == fill).all()
    assert (found[:, 18:] == fill).all()


def test_flip_and_crop_inside_a_warp_are_those_outside_it():
    image = noise(30, 28)
    config = dataclasses.replace(PLAIN, resize=(30, 28), flip=True)
    for warp in ({}, {"rotate": 10.0, "shift": 0.1}):
        found = augment.training(Image.fromarray(image), dataclasses.replace(config, **warp), Fixed(0, 0, 0, 0, 0))
        np.testing.assert_array_equal(found[..., 0], image[6:30, 4:28][:, ::-1])


def test_zoom_is_the_scale_it_says():
    """A centred square of side 8, zoomed by 2, has side 16."""
    image = np.zeros((24, 24), np.uint8)
    image[8:16, 8:16] = 255
    config = dataclasses.replace(PLAIN, zoom=1.0)
    for direction, side in ((1, 16), (-1, 4)):
        found = augment.training(Image.fromarray(image), config, Fixed(0, 0, 0, direction, 0))
        assert math.sqrt(found.sum() / 255) == pytest.approx(side, rel=0.02)


def test_a_warp_uncovers_the_colour_of_the_border():
    image = np.full((24, 24, 3), (10, 200, 90), np.uint8)
    image[6:18, 6:18] = 0
    for seed in range(20):
        found = trained(image, seed, rotate=45.0, shift=0.3)
        assert (found[[0, 0, -1, -1], [0, -1, 0, -1]].max(0) <= (10, 200, 90)).all()
        assert (found.reshape(-1, 3) == (10, 200, 90)).all(1).mean() > 0.4


def test_jitter_stays_within_its_strength_and_leaves_geometry_alone():
    image = np.full((24, 24, 3), 100, np.uint8)
    levels = [int(trained(image, seed, jitter=0.2)[0, 0, 0]) for seed in range(100)]
    assert min(levels) >= 79
    assert max(levels) <= 121
    assert max(levels) - min(levels) > 25
    grey = noise()
    changed = trained(grey, jitter=0.2)[..., 0]
    assert np.corrcoef(changed.ravel(), grey.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("fill", ["pixels", "mean"])
def test_erasing_takes_one_rectangle_of_the_published_size(fill):
    image = np.full((24, 24, 3), 7, np.uint8)
    image[0] = 250
    erased = 0
    for seed in range(200):
        found = trained(image, seed, erasing=0.5, erasing_fill=fill)
        changed = (found != image).any(-1)
        if changed.any():
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            high, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert changed.sum() >= 0.9 * high * wide
            assert 0.01 < high * wide / 24**2 < 0.45
            assert 0.2 < high / wide < 5
            erased += 1
            if fill == "mean":
                assert set(found[changed].ravel().tolist()) == {round((23 * 7 + 250) / 24)}
    assert 70 < erased < 130


def test_erasing_does_not_touch_the_picture_it_was_given():
    image = noise()
    picture = Image.fromarray(image)
    augment.training(picture, dataclasses.replace(PLAIN, erasing=1.0), np.random.default_rng(0))
    np.testing.assert_array_equal(np.asarray(picture), image)


def test_a_random_resized_crop_keeps_within_its_share():
    config = dataclasses.replace(PLAIN, resized_crop=0.3)
    for seed in range(200):
        left, top, right, bottom = augment._box((40, 60), config, np.random.default_rng(seed))
        assert 0 <= left < right <= 40
        assert 0 <= top < bottom <= 60
        assert 0.28 < (right - left) * (bottom - top) / 2400 <= 1
    assert trained(noise(60, 40, 3), resized_crop=0.3).shape == (24, 24, 3)


EVERYTHING = {"flip": True, "rotate": 10.0, "shift": 0.1, "zoom": 0.1, "shear": 5.0, "jitter": 0.2, "erasing": 0.5, "resize": (28, 30)}


@pytest.mark.parametrize("channels", [1, 3])
def test_the_generator_decides_all(channels):
    image = noise(40, 40, channels)
    first = [trained(image, seed, **EVERYTHING) for seed in range(8)]
    np.testing.assert_array_equal(first, [trained(image, seed, **EVERYTHING) for seed in range(8)])
    assert len({each.tobytes() for each in first}) == 8


def encoded(image, kind, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def test_a_large_jpeg_is_decoded_smaller_but_never_below_what_is_asked():
    raw = encoded(smooth(512, 640), "JPEG", quality=95)
    whole, part = decode(io.BytesIO(raw), "L"), decode(io.BytesIO(raw), "L", (100, 100))
    assert whole.size == (640, 512)
    assert part.size == (160, 128)
    small = dataclasses.replace(PLAIN, size=(50, 50))
    difference = augment.centred(whole, small).astype(int) - augment.centred(part, small)
    assert np.abs(difference).mean() < 1.5
    assert decode(io.BytesIO(raw), "L", (513, 0)).size == (640, 512)


def test_modes_become_the_one_asked_for():
    colour = noise(8, 9, 3)
    grey = np.asarray(Image.fromarray(colour).convert("L"))
    np.testing.assert_array_equal(np.asarray(decode(io.BytesIO(encoded(colour, "PNG")), "L")), grey)
    np.testing.assert_array_equal(np.asarray(decode(io.BytesIO(encoded(grey, "PNG")), "RGB")), np.stack([grey] * 3, -1))
    alpha = np.concatenate([colour, np.full((8, 9, 1), 3, np.uint8)], -1)
    np.testing.assert_array_equal(np.asarray(decode(io.BytesIO(encoded(alpha, "PNG")), "RGB")), colour)
    file = io.BytesIO()
    Image.fromarray(colour).convert("P").save(file, "PNG", transparency=b"\x00\x80")
    assert decode(io.BytesIO(file.getvalue()), "RGB").mode == "RGB"
    cmyk = io.BytesIO()
    Image.fromarray(smooth(64, 64)).convert("CMYK").save(cmyk, "JPEG")
    assert decode(io.BytesIO(cmyk.getvalue()), "L", (8, 8)).mode == "L"


def test_orientation_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(io.BytesIO(encoded(noise(8, 16), "JPEG", exif=exif)), "L").size == (16, 8)


def test_a_banner_is_cut_off_at_every_decoding_size():
    image = np.full((420, 300), 90, np.uint8)
    image[-20:] = 255
    raw = encoded(image, "JPEG", quality=95)
    for enough, height in (((0, 0), 400), ((60, 40), 100)):
        picture = decode(io.BytesIO(raw), "L", enough, banner=20)
        assert picture.size[1] == height
        assert np.asarray(picture).max() < 110


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "cannot identify"),
        (b"not a picture", "cannot identify"),
        (encoded(noise(64, 64), "JPEG")[:900], "truncated"),
        (encoded(noise(64, 64), "PNG")[:900], "truncated"),
        (encoded(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000, "PNG"), "mode I;16; 8 bits a channel"),
    ],
)
def test_what_cannot_be_read_says_why_in_one_line(raw, message):
    with pytest.raises(Corrupt, match=message) as caught:
        decode(io.BytesIO(raw), "RGB")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_gone_is_unreadable(tmp_path):
    with pytest.raises(Corrupt, match="No such file"):
        decode(str(tmp_path / "none.jpg"), "L")
