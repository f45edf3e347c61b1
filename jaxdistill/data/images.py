"""Images for classification and re-identification: what to read, how it is split, what is done to it on the way.

`load` lists and splits; pictures are read when asked for, so that a set of any size starts at once.
"""

import contextlib
import dataclasses
import functools
import math

import numpy as np
from PIL import Image

from jaxdistill import UserError
from jaxdistill.data import augment, cache, image_arrays, image_layouts, image_splits
from jaxdistill.data.image_layouts import FINE_GRAINED, REID, UNKNOWN
from jaxdistill.data.pictures import Corrupt

SOURCES = image_arrays.SOURCES | {"folder": image_layouts.folder} | FINE_GRAINED | REID
TASKS = ("classification", "reid")


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """The section `data`. Hashable: `load` remembers what it loaded."""

    source: str = "glyphs"  # glyphs | npz | tfds | folder | cub | cars | aircraft | market1501 | duke | msmt17 | veri776
    path: str = ""  # folder, .npz file, or a TFDS dataset's name or folder
    task: str = ""  # classification | reid; "": what the source is for
    size: tuple = (32, 32)  # (height, width) that enters the model
    resize: tuple = (0, 0)  # (height, width) from which `size` is cropped, at random in training, else the centre; (0, 0): no crop
    channels: int = 1  # 1 | 3
    classes: int = 0  # the first n classes, or training identities; 0: all
    validation: float = 0.1  # share of each class's training images (re-ID: of the training identities); 0: no validation split
    test: float = 0.2  # the same, of sources that do not split
    corrupt: int = 0  # unreadable images that may be left out, in all; each is named in a warning
    workers: int = 0  # processes that read and augment; 0: two threads
    # Augmentation, in training only
    flip: bool = False  # left to right, half of the images
    rotate: float = 0.0  # degrees, either way
    shift: float = 0.0  # share of the size, either way, along each axis
    zoom: float = 0.0  # by up to 1 + zoom, in or out
    shear: float = 0.0  # degrees, either way
    resized_crop: float = 0.0  # least share of the picture's area that a random resized crop keeps; 0: the crop from `resize`
    jitter: float = 0.0  # brightness, contrast and saturation, each by a factor within 1 -+ jitter
    erasing: float = 0.0  # probability of erasing a rectangle
    erasing_fill: str = "pixels"  # pixels (random) | mean (of the image)
    # npz
    group: str = ""  # array whose values `test_groups` are the test images; the others train
    test_groups: tuple = ()
    camera: str = ""  # array that tells the camera; "": `camera`, where there is one
    # glyphs
    per_class: int = 100  # training images of each class
    test_per_class: int = 20
    test_families: tuple = ()  # families of font faces that only test images show; (): all families in both
    seed: int = 0  # of the drawing: the data set, not the run

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if not (type(value) is kind or (kind is float and type(value) is int)):
                self._refuse(field.name, kind.__name__)
        if self.source not in SOURCES:
            self._refuse("source", " | ".join(SOURCES))
        if bool(self.path) == (self.source == "glyphs"):
            self._refuse("path", "none with data.source 'glyphs'" if self.path else f"a path with data.source {self.source!r}")
        only = "reid" if self.source in REID else "classification" if self.source in FINE_GRAINED else ""
        if self.task not in ("", only, *(() if only else TASKS)):
            self._refuse("task", f"{only!r} with data.source {self.source!r}" if only else " | ".join(TASKS))
        object.__setattr__(self, "task", self.task or only or "classification")
        self._check_sizes()
        for name, least, most in (
            ("validation", 0, 0.9), ("test", 0, 0.9), ("rotate", 0, 180), ("shift", 0, 1), ("zoom", 0, 4), ("shear", 0, 60),
            ("resized_crop", 0, 1), ("jitter", 0, 1), ("erasing", 0, 1), ("corrupt", 0, math.inf), ("workers", 0, 256),
            ("classes", 0, math.inf), ("per_class", 2, math.inf), ("test_per_class", 1, math.inf), ("seed", 0, 2**31 - 1),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                self._refuse(name, f"{least} or more" if most == math.inf else f"{least} to {most}")
        if self.classes == 1:
            self._refuse("classes", "0 (all), or 2 or more")
        if self.erasing_fill not in ("pixels", "mean"):
            self._refuse("erasing_fill", "pixels | mean")
        if bool(self.group) != bool(self.test_groups):
            self._refuse("test_groups" if self.group else "group", "data.group and data.test_groups together, or neither")
        if self.group and self.source != "npz":
            self._refuse("group", f"'' with data.source {self.source!r}; groups are of 'npz'")
        if self.camera and self.source != "npz":
            self._refuse("camera", f"'' with data.source {self.source!r}; an array is of 'npz'")
        if self.test_families and self.source != "glyphs":
            self._refuse("test_families", f"() with data.source {self.source!r}; families are of 'glyphs'")

    def _check_sizes(self):
        for name in ("size", "resize"):
            value = getattr(self, name)
            if len(value) != 2 or any(type(number) is not int for number in value):
                self._refuse(name, "two whole numbers, (height, width)")
        if not all(1 <= number <= 4096 for number in self.size):
            self._refuse("size", "1 to 4096 each way")
        if self.resize != (0, 0) and not all(self.size[i] <= self.resize[i] <= 4096 for i in (0, 1)):
            self._refuse("resize", f"(0, 0), or data.size {self.size} or more each way, to 4096")
        if self.channels not in (1, 3):
            self._refuse("channels", "1 | 3")

    def _refuse(self, name: str, accepted: str):
        raise UserError(f"config key data.{name}: found {getattr(self, name)!r}; accepted: {accepted}")

    @property
    def stored(self) -> tuple[int, int]:
        """(height, width) before the crop."""
        return self.resize if all(self.resize) else self.size

    @property
    def enough(self) -> tuple[int, int]:
        """(height, width) of a picture beyond which no detail reaches the model: a JPEG is decoded at no less. Twice what is
        needed, so that the resampling that follows is a good one."""
        shrink = 2 / math.sqrt(self.resized_crop or 1)
        return tuple(math.ceil(number * shrink) for number in self.stored)

    @property
    def augmented(self) -> str:
        """The key that makes training images differ from one epoch to the next; "" where none does."""
        chance = ("resized_crop", "flip", "rotate", "shift", "zoom", "shear", "jitter", "erasing")
        cropped = "resize" if self.stored != self.size and not self.resized_crop else ""
        return next((name for name in chance if getattr(self, name)), cropped)

    @property
    def warps(self) -> bool:
        return any((self.rotate, self.shift, self.zoom, self.shear))


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The images of one split.

    Attributes:
      names: what each image is called, for people.
      labels: int32 [N]; class indices, or in re-ID splits that do not train identities (< 0: junk).
      cameras: int32 [N].
      gallery: bool [N]; False: a query (or no re-ID).
      damaged: name -> reason, of the images of all splits that this process could not read.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    cameras: np.ndarray
    gallery: np.ndarray
    places: np.ndarray
    source: object
    config: ImageConfig
    damaged: dict

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, i: int) -> Image.Image:
        """Image i as stored, mode L or RGB. Raises `pictures.Corrupt` where it cannot be read."""
        return self.source(int(self.places[i]))

    def read(self, i: int) -> np.ndarray:
        """Image i as evaluation has it, uint8 [h, w, channels]. Raises `pictures.Corrupt`."""
        return augment.centred(self.picture(i), self.config)

    @functools.cached_property
    def members(self) -> tuple[np.ndarray, ...]:
        """For each label, in order, its images."""
        order = np.argsort(self.labels, kind="stable")
        _, starts = np.unique(self.labels[order], return_index=True)
        return tuple(np.split(order, starts[1:]))


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images, ready to train on.

    Attributes:
      splits: "train", "validation" (unless data.validation is 0 and the source has none), "test" -> Split.
      classes: names of the training labels, in order.
      facts: JSON-able identity and size of what was read. The fingerprints are of names, labels, cameras, and the content of images,
        of files their size and both ends.
    """

    splits: dict[str, Split]
    classes: tuple[str, ...]
    facts: dict


@functools.lru_cache(maxsize=4)  # the runs of one job share one set
def load(config: ImageConfig) -> ImageSet:
    """Lists the images of `config.source` and splits them.

    Raises:
      UserError: whatever of the user's does not fit, in one line (see `image_layouts`, `image_arrays`, `image_splits`).
    """
    listing = SOURCES[config.source](config)
    examples = listing.examples
    parts, junk = image_splits.assign(examples, config)
    damaged, splits = {}, {}
    facts = {"source": config.source, "task": config.task, "junk": junk, "splits": {}}
    for name, columns in image_splits.columns(examples, parts, config).items():
        places = columns["places"].tolist()
        names = tuple(examples[i].name for i in places)
        split = splits[name] = Split(names, **columns, source=listing.picture, config=config, damaged=damaged)
        content = [part for i in places for part in (*examples[i], listing.picture.stamp(i))]
        sizes = {"images": len(split), "classes": len(set(split.labels[split.labels >= 0].tolist()))}
        if config.task == "reid":
            known = min((examples[i].camera for i in places), default=0) > UNKNOWN
            sizes |= {"cameras": len(set(split.cameras.tolist())) if known else 0}
            sizes |= {"queries": int((~split.gallery).sum())} if name != "train" else {}
        facts["splits"][name] = {"sha256": cache.key(*content, split.gallery.tobytes()), **sizes}
    labels = sorted({examples[i].label for i in parts["train"]})
    facts["classes"] = len(labels)
    return ImageSet(splits, tuple(str(listing.names.get(label, label)) for label in labels), facts)


@functools.lru_cache(maxsize=4)  # the runs of one job share it
def statistics(split: Split, count: int = 256) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each channel, of values from 0 to 1, over at most `count` readable images spread over the split."""
    total = squares = np.zeros(split.config.channels)
    count_read = 0
    for i in np.unique(np.linspace(0, len(split) - 1, count).astype(int)).tolist():
        with contextlib.suppress(Corrupt):  # told and counted where batches are made
            pixels = split.read(i).reshape(-1, split.config.channels) / np.float32(255)
            total, squares = total + pixels.mean(0, dtype=np.float64), squares + np.square(pixels).mean(0, dtype=np.float64)
            count_read += 1
    mean = total / max(count_read, 1)
    deviation = np.sqrt(np.maximum(squares / max(count_read, 1) - mean**2, 0))
    return tuple(mean.round(3).tolist()), tuple(np.maximum(deviation.round(3), 0.001).tolist())


def describe(batch: dict[str, np.ndarray], classes: tuple[str, ...], rows: int = 8, width: int = 48) -> str:
    """A batch for people: its shape, the label and partner of the first `rows` rows, and the first image in characters."""
    image = batch["image"]
    count, height, wide, channels = image.shape
    lines = [f"{count} images of {height} x {wide} x {channels}, values {image.min()} to {image.max()}, {batch['valid'].sum()} valid"]
    for i in range(min(rows, count)):
        label = int(batch["label"][i])
        name = classes[label] if 0 <= label < len(classes) else "no class"
        partner = f", partner {batch['partner'][i]}" if batch["partner"][i] != batch["row"][i] else ""
        lines.append(f"row {batch['row'][i]}: label {label} ({name}), camera {batch['camera'][i]}{partner}")
    width = min(width, 2 * wide)
    small = Image.fromarray(image[0].mean(-1).astype(np.uint8)).resize((width, max(1, width * height // wide // 2)))
    shades = " .:-=+*#%@"
    lines += ["".join(shades[value * len(shades) // 256] for value in line) for line in np.asarray(small).tolist()]
    return "\n".join(line.rstrip() for line in lines) + "\n"
