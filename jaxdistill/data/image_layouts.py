"""Published image sets, and folders of classes, as they lie on disk once unpacked. One function a layout: config -> Listing.

Nothing is split here that the set itself does not split. Lists that a set calls validation (Aircraft, MSMT17) are training
images, as in the published numbers: a validation split is drawn from them (`images.load`). Every file that is missing or does
not read as its set's files do is one line.
"""

import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jaxdistill import UserError
from jaxdistill.data.pictures import SUFFIXES, Files

UNKNOWN = -1  # a camera that nothing tells
PARTS = ("train", "validation", "test", "query", "gallery")
AIRCRAFT_BANNER = 20  # rows at the bottom of each picture that name its owner, and so the kind of aircraft


class Example(NamedTuple):
    """One image. name: file, or place; label: class or identity, < 0 where junk; part: one of PARTS, "test" in re-ID being query and
    gallery, or "" where the source does not split; camera: UNKNOWN, or 0 and more."""

    name: str
    label: int | str
    part: str = ""
    camera: int = UNKNOWN


class Listing(NamedTuple):
    """What a source holds. picture(i) is that of examples[i]; names: of labels, where they have any but themselves."""

    examples: list[Example]
    picture: Callable
    names: dict = {}


def folder(config) -> Listing:
    """PATH/CLASS/*.jpg, or PATH/{train,val|validation,test}/CLASS/*.jpg (re-ID: also query and gallery). A `_cN` in a file's name
    is its camera."""
    root = _root(config, "")
    below, spelled = _folders(root), {"val": "validation"} | {part: part for part in PARTS}
    parts = {name: spelled[name] for name in below if name in spelled}
    if parts and len(parts) < len(below):
        wanted = f"either folders of classes or {', '.join(spelled)}, not both"
        raise UserError(f"data.path {config.path!r}: found {', '.join(below[:6])}; accepted: {wanted}")
    examples = []
    for top, part in (parts or {"": ""}).items():
        for label in _folders(os.path.join(root, top)):
            for name in _images(os.path.join(root, top, label)):
                camera = re.search(r"_c(\d+)", name)
                examples.append(Example("/".join(filter(None, (top, label, name))), label, part, int(camera[1]) if camera else UNKNOWN))
    if not examples:
        raise UserError(f"data.path {config.path!r}: no image in it; accepted: CLASS/*.jpg or train/CLASS/*.jpg ({' '.join(SUFFIXES)})")
    return _listed(config, root, examples)


def cub(config) -> Listing:
    """CUB-200-2011: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt, images/."""
    root = _root(config, "images.txt", "CUB_200_2011")
    images, labels, training, classes = (
        {int(number): value for number, value in _table(os.path.join(root, file), r"(\d+) +(.+)")}
        for file in ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    )
    for file, found in (("image_class_labels.txt", labels), ("train_test_split.txt", training)):
        if odd := sorted(images.keys() ^ found.keys()):
            raise UserError(f"{os.path.join(root, file)}: image {odd[0]} is not in it and in images.txt alike; accepted: files of one set")
    examples = []
    for number, name in images.items():
        label = _entry(classes, labels[number], os.path.join(root, "image_class_labels.txt"), "classes.txt")
        examples.append(Example(f"images/{name}", label, "train" if training[number] == "1" else "test"))
    return _listed(config, root, examples)


def cars(config) -> Listing:
    """Stanford Cars: devkit/{cars_train_annos,cars_test_annos_withlabels,cars_meta}.mat with cars_train/ and cars_test/, or the
    older cars_annos.mat with car_ims/."""
    if os.path.isfile(older := os.path.join(_root(config, ""), "cars_annos.mat")):
        classes, found = _matrix(older, "class_names"), _matrix(older, "annotations")
        rows = [(_field(row, "relative_im_path", older), row, "test" if int(_field(row, "test", older)) else "train") for row in found]
        return _listed(config, os.path.dirname(older), _cars(rows, classes, older))
    root = _root(config, "devkit", "stanford_cars")
    meta = os.path.join(root, "devkit/cars_meta.mat")
    classes, examples = _matrix(meta, "class_names"), []
    for part, name in (("train", "cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        file = os.path.join(root, "devkit", name)
        file = file if os.path.isfile(file) else os.path.join(root, name)  # the labels of the test are a separate download
        rows = [(f"cars_{part}/{_field(row, 'fname', file)}", row, part) for row in _matrix(file, "annotations")]
        examples += _cars(rows, classes, file)
    return _listed(config, root, examples)


def _cars(rows, classes, file: str) -> list[Example]:
    names = {number: str(name) for number, name in enumerate(classes, 1)}
    return [Example(str(path), _entry(names, _field(row, "class", file), file, "class_names"), part) for path, row, part in rows]


def aircraft(config) -> Listing:
    """FGVC-Aircraft 2013b, variants: data/images, data/images_variant_{train,val,test}.txt. Trained on train and val, as published;
    the banner of 20 rows is cut off."""
    root = os.path.join(_root(config, "data", "fgvc-aircraft-2013b"), "data")
    examples = []
    for file, part in (("train", "train"), ("val", "train"), ("test", "test")):
        for number, variant in _table(os.path.join(root, f"images_variant_{file}.txt"), r"(\d+) (.+)"):
            examples.append(Example(f"images/{number}.jpg", variant, part))
    return _listed(config, root, examples, banner=AIRCRAFT_BANNER)


def _named(train: str, query: str, gallery: str, inside: str) -> Callable:
    """A re-ID set whose file names tell: IDENTITY_cCAMERA...jpg, identity -1 being junk."""

    def listing(config) -> Listing:
        root, examples = _root(config, train, inside), []
        for top, part in ((train, "train"), (query, "query"), (gallery, "gallery")):
            for name in _images(_exists(os.path.join(root, top))):
                found = re.match(r"(-?\d+)_c(\d+)", name)
                if not found:
                    raise UserError(f"{os.path.join(root, top, name)}: its name tells no identity; accepted: as in 0002_c1s1_000451_03.jpg")
                examples.append(Example(f"{top}/{name}", int(found[1]), part, int(found[2])))
        return _listed(config, root, examples)

    return listing


market1501 = _named("bounding_box_train", "query", "bounding_box_test", "Market-1501-v15.09.15")
duke = _named("bounding_box_train", "query", "bounding_box_test", "DukeMTMC-reID")
veri776 = _named("image_train", "image_query", "image_test", "VeRi")


def msmt17(config) -> Listing:
    """MSMT17: list_{train,val,query,gallery}.txt with train/ and test/ (V2: mask_train_v2, mask_test_v2). The third field of a
    file's name is its camera. Trained on train and val, as published."""
    root = _root(config, "list_train.txt", "MSMT17", "MSMT17_V1", "MSMT17_V2")
    examples = []
    for list_, part in (("train", "train"), ("val", "train"), ("query", "query"), ("gallery", "gallery")):
        file = os.path.join(root, f"list_{list_}.txt")
        top = "train" if part == "train" else "test"
        top = f"mask_{top}_v2" if os.path.isdir(os.path.join(root, f"mask_{top}_v2")) else top
        for name, label in _table(file, r"(\S+) +(-?\d+)"):
            found = re.match(r"\d+_\d+_(\d+)_", os.path.basename(name))
            if not found:
                raise UserError(f"{file}: {name} tells no camera; accepted: as in 0000/0000_000_01_0303morning_0015_0.jpg")
            examples.append(Example(f"{top}/{name}", int(label), part, int(found[1])))
    return _listed(config, root, examples)


FINE_GRAINED = {"cub": cub, "cars": cars, "aircraft": aircraft}
REID = {"market1501": market1501, "duke": duke, "msmt17": msmt17, "veri776": veri776}


def _listed(config, root: str, examples: list[Example], banner: int = 0) -> Listing:
    if not examples:
        raise UserError(f"data.path {config.path!r}: {root} lists no image; accepted: the {config.source} set as it is unpacked")
    names = [example.name for example in examples]
    return Listing(examples, Files(root, names, config.channels, enough=config.enough, banner=banner))


def _root(config, marker: str, *inside: str) -> str:
    """The folder of `config.path` that holds `marker`: itself, or one of the names in `inside` that the archive unpacks to."""
    path = os.path.expanduser(config.path)
    for root in (path, *(os.path.join(path, name) for name in inside)):
        if os.path.exists(os.path.join(root, marker)) and os.path.isdir(root):
            return root
    found = f"without {marker}" if os.path.isdir(path) else "not found"
    raise UserError(f"data.path {config.path!r}: {found}; accepted: the folder that the {config.source} set unpacks to")


def _exists(path: str) -> str:
    if not os.path.exists(path):
        raise UserError(f"{path}: No such file or directory; accepted: the set as it is unpacked")
    return path


def _folders(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _images(path: str) -> list[str]:
    if not os.path.isdir(path):
        raise UserError(f"{path}: not a folder; accepted: the set as it is unpacked")
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith("."))


def _table(path: str, pattern: str) -> Iterator[tuple[str, ...]]:
    """The groups of `pattern` in each line of a text file that is not empty."""
    try:
        with open(_exists(path), encoding="utf-8") as file:
            lines = file.read().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text (byte {error.start}); accepted: the set's own file") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            found = re.fullmatch(pattern, line.strip())
            if not found:
                raise UserError(f"{path}, line {number}: found {line[:60]!r}; accepted: {pattern}")
            yield found.groups()


def _entry(names: dict, key, file: str, where: str) -> str:
    try:
        return names[int(key)]
    except (KeyError, ValueError):
        raise UserError(f"{file}: class {key}, which is not in {where}; accepted: {len(names)} classes from 1 on") from None


def _matrix(path: str, name: str):
    """A struct array, or cell array of strings, of a MATLAB file."""
    import scipy.io

    _exists(path)
    try:
        values = scipy.io.loadmat(path, squeeze_me=True, variable_names=[name])
    except Exception as error:  # scipy raises many kinds, for damage and for versions that it does not know
        found = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path}: not a readable MATLAB file ({found}); accepted: the set's own") from None
    if name not in values:
        raise UserError(f"{path}: has no {name!r}; accepted: the file of that name in Stanford Cars")
    return np.atleast_1d(values[name])


def _field(row, name: str, file: str):
    if name not in (row.dtype.names or ()):
        raise UserError(f"{file}: its annotations have no {name!r} (labels of the test are in cars_test_annos_withlabels.mat)")
    return row[name]
