"""How one picture is read: from a file, from an array in memory, or from a TFDS record. Everything above this sees a PIL
image of mode L (one channel) or RGB (three).

EXIF orientation is left alone: published splits were made and measured without it. Transparency is dropped.
"""

import hashlib
import io
import os
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxdistill import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
MODES = {1: "L", 3: "RGB"}
ENDS = 4096  # bytes of a file's beginning, and of its end, that its stamp is of


class Corrupt(Exception):
    """A picture that cannot be read, with the reason."""


class Files:
    """Pictures in files, read anew each time.

    Args:
      root: folder that the names are relative to.
      names: of the files.
      channels: 1 or 3.
      enough: (height, width) beyond which detail is not needed: a large JPEG is then decoded at 1/2, 1/4 or 1/8 of its
        size, never at less than this; (0, 0): always in full.
      banner: rows of the file cut off at the bottom.

    Raises:
      UserError: a file that is not there.
    """

    def __init__(self, root: str, names: Sequence[str], channels: int, *, enough: tuple[int, int] = (0, 0), banner: int = 0):
        self.root, self.names, self.mode, self.enough, self.banner = root, tuple(names), MODES[channels], enough, banner
        self.stamps = [_stamp(os.path.join(root, name)) for name in self.names]

    def __call__(self, i: int) -> Image.Image:
        return decode(os.path.join(self.root, self.names[i]), self.mode, self.enough, self.banner)

    def stamp(self, i: int) -> str:
        """What the fingerprint knows of picture i: its file's size and a CRC of both ends (hashing gigabytes at each start would not
        pay). Without compression all pictures of one shape have one size."""
        return self.stamps[i]


class Arrays(NamedTuple):
    """Pictures in memory. images: uint8 [N, H, W] or [N, H, W, 1 or 3]; channels: 1 or 3, of what is handed out."""

    images: np.ndarray
    channels: int

    def __call__(self, i: int) -> Image.Image:
        image = self.images[i]
        picture = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
        return picture if picture.mode == MODES[self.channels] else picture.convert(MODES[self.channels])

    def stamp(self, i: int) -> str:
        """SHA-256 of picture i."""
        return hashlib.sha256(np.ascontiguousarray(self.images[i])).hexdigest()


class Records(NamedTuple):
    """Encoded pictures of a TFDS data source. sources: by split; places: (split, row) of each picture; enough: as of Files."""

    sources: dict
    places: tuple
    digests: tuple
    channels: int
    enough: tuple = (0, 0)

    def __call__(self, i: int) -> Image.Image:
        split, row = self.places[i]
        return decode(io.BytesIO(self.sources[split][row]["image"]), MODES[self.channels], self.enough)

    def stamp(self, i: int) -> str:
        """SHA-256 of the encoded picture i."""
        return self.digests[i]


def decode(file, mode: str, enough: tuple[int, int] = (0, 0), banner: int = 0) -> Image.Image:
    """A file (path or binary stream) as a picture of `mode`; see `Files`.

    Raises:
      Corrupt: not a picture, truncated, or of more than 8 bits a channel (PIL would clip them, not scale them).
    """
    try:
        with Image.open(file) as picture:
            if picture.mode[0] in "IF":
                raise Corrupt(f"mode {picture.mode}; 8 bits a channel are accepted")
            height = picture.size[1]
            if all(enough):  # a grey picture needs the JPEG's luminance alone
                picture.draft(mode if mode == "L" and picture.mode == "RGB" else None, (enough[1], enough[0]))
            picture.load()
            if picture.mode == "P":  # straight to RGB, PIL warns of transparency
                picture = picture.convert("RGBA")
            picture = picture.convert(mode)
            if banner:
                width, now = picture.size
                if height <= banner:
                    raise Corrupt(f"{height} rows, of which {banner} are a banner")
                picture = picture.crop((0, 0, width, now - -(-banner * now // height)))
            return picture
    except (Corrupt, MemoryError):
        raise
    except Exception as error:  # a damaged file may raise anything (OSError, SyntaxError, struct.error, ...): it is unreadable
        found = (str(error).splitlines() or [""])[0]
        raise Corrupt(f"{type(error).__name__}: {found}") from None


def _stamp(path: str) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            ends = file.read(2 * ENDS if size <= 2 * ENDS else ENDS)
            if size > 2 * ENDS:
                file.seek(-ENDS, os.SEEK_END)
                ends += file.read(ENDS)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; accepted: the image file that the data set lists") from None
    return f"{size} {zlib.crc32(ends)}"
