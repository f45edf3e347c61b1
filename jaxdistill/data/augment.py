"""What is done to a picture on its way into the model: size, crop and, in training, augmentation.

Geometry first, as one affine warp (so that nothing is interpolated twice), then colour, then erasing. Every random number
comes from the generator that is handed in, one for each image: the result depends on nothing else.
"""

import math

import numpy as np
from PIL import Image, ImageEnhance

BILINEAR = Image.Resampling.BILINEAR  # in `resize` PIL widens the filter where it shrinks: no aliasing
ERASED_AREA = (0.02, 0.4)  # share of the image (Zhong et al. 2017, arXiv 1708.04896)
ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width
CROP_ASPECT = (3 / 4, 4 / 3)  # width / height of a random resized crop (Szegedy et al. 2014, arXiv 1409.4842)


def centred(picture: Image.Image, config) -> np.ndarray:
    """For evaluation: to `config.resize`, then the centre of `config.size`. uint8 [h, w, channels]."""
    picture = _resized(picture, config)
    height, width = config.size
    top, left = (picture.size[1] - height) // 2, (picture.size[0] - width) // 2
    return _pixels(picture)[top : top + height, left : left + width]


def training(picture: Image.Image, config, rng: np.random.Generator) -> np.ndarray:
    """For training: random crop, flip and affine warp, colour, erasing, as `config` (an ImageConfig) has them.

    Args:
      picture: mode L or RGB, any size.
      rng: of this one image.

    Returns:
      uint8 [h, w, channels].
    """
    height, width = config.size
    if config.resized_crop:
        picture = picture.resize((width, height), BILINEAR, box=_box(picture.size, config, rng))
        top = left = 0
    else:
        picture = _resized(picture, config)
        top, left = (int(rng.integers(room + 1)) for room in (picture.size[1] - height, picture.size[0] - width))
    flip = config.flip and rng.random() < 0.5
    if config.warps:
        picture = _warp(picture, config, (top, left), flip, rng)
        top, left, flip = 0, 0, False
    if config.jitter:  # C code on PIL images
        if picture.size != (width, height):
            picture = picture.crop((left, top, left + width, top + height))
            top = left = 0
        picture = _jittered(picture, config.jitter, rng)
    image = _pixels(picture)[top : top + height, left : left + width]
    if flip:
        image = image[:, ::-1]
    if config.erasing and rng.random() < config.erasing:
        image = _erased(image, config.erasing_fill, rng)
    return image


def _pixels(picture: Image.Image) -> np.ndarray:
    """uint8 [h, w, channels], read-only."""
    width, height = picture.size
    return np.frombuffer(picture.tobytes(), np.uint8).reshape(height, width, -1)


def _resized(picture: Image.Image, config) -> Image.Image:
    height, width = config.resize if all(config.resize) else config.size
    return picture if picture.size == (width, height) else picture.resize((width, height), BILINEAR)


def _box(size: tuple[int, int], config, rng) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a random part: area uniform from `resized_crop` to 1, aspect log-uniform; it keeps within the
    picture, so that a wide one of a large area is cut to the side it meets."""
    width, height = size
    area = rng.uniform(config.resized_crop, 1.0) * width * height
    aspect = math.exp(rng.uniform(*map(math.log, CROP_ASPECT)))
    wide, high = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
    left, top = rng.random() * (width - wide), rng.random() * (height - high)
    return left, top, left + wide, top + high


def _warp(picture: Image.Image, config, corner: tuple[int, int], flip: bool, rng) -> Image.Image:
    """The crop of `config.size` at `corner` (top, left), warped about its centre. What comes into view from beyond the picture
    has the colour of the picture's border."""
    height, width = config.size
    turn, along, down, zoom, slant = rng.uniform(-1.0, 1.0, 5).tolist()
    angle, slant = math.radians(config.rotate * turn), math.tan(math.radians(config.shear * slant))
    # Where the output's pixel comes from, seen from the centre: rotation x shear / zoom, each as likely as its inverse.
    scale = math.exp(-math.log1p(config.zoom) * zoom)
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    a, b, d, e = cos, cos * slant - sin, sin, sin * slant + cos
    if flip:
        a, d = -a, -d
    x, y = width / 2, height / 2
    at_x, at_y = corner[1] + x + config.shift * width * along, corner[0] + y + config.shift * height * down
    matrix = (a, b, at_x - a * x - b * y, d, e, at_y - d * x - e * y)
    return picture.transform((width, height), Image.Transform.AFFINE, matrix, resample=BILINEAR, fillcolor=_border(picture))


def _border(picture: Image.Image):
    """Median colour of the corners and the middles of the sides: an int, or a tuple of three. (All of the border, through numpy,
    would cost a small image as much as its warp.)"""
    pixels, (right, bottom) = picture.load(), (picture.size[0] - 1, picture.size[1] - 1)
    x, y = right // 2, bottom // 2
    ring = ((0, 0), (x, 0), (right, 0), (0, y), (right, y), (0, bottom), (x, bottom), (right, bottom))
    colours = [pixels[place] for place in ring]
    return sorted(colours)[4] if picture.mode == "L" else tuple(sorted(channel)[4] for channel in zip(*colours, strict=True))


def _jittered(picture: Image.Image, strength: float, rng) -> Image.Image:
    """Brightness, contrast and (of colour) saturation, each by a factor within 1 -+ strength."""
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        factor = rng.uniform(1 - strength, 1 + strength)
        if change is not ImageEnhance.Color or picture.mode == "RGB":
            picture = change(picture).enhance(factor)
    return picture


def _erased(image: np.ndarray, fill: str, rng) -> np.ndarray:
    """Random erasing: one rectangle, area uniform, aspect log-uniform, redrawn (at most ten times) until it fits."""
    height, width, channels = image.shape
    for _ in range(10):
        area = rng.uniform(*ERASED_AREA) * height * width
        aspect = math.exp(rng.uniform(*map(math.log, ERASED_ASPECT)))
        high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < high < height and 0 < wide < width:
            top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
            noise = rng.integers(0, 256, (high, wide, channels), np.uint8) if fill == "pixels" else np.rint(image.mean((0, 1)))
            image = image.copy()  # what PIL hands out is read-only
            image[top : top + high, left : left + wide] = noise
            break
    return image
