"""Images that are not files: drawn letters, arrays in an .npz, TFDS records. One function a source: config -> Listing."""

import hashlib
import os

import numpy as np

from jaxdistill import UserError
from jaxdistill.data import glyphs as letters
from jaxdistill.data.image_layouts import PARTS, UNKNOWN, Example, Listing
from jaxdistill.data.image_splits import held_out
from jaxdistill.data.pictures import Arrays, Records

ARRAYS = {"image": ("image", "images", "x"), "label": ("label", "labels", "y")}


def glyphs(config) -> Listing:
    """`per_class` letters of each class to train on and `test_per_class` others. With `test_families` the test is in those families of
    faces, which the training images then never show. Re-ID: a letter is an identity, a face a camera; a share `test` of the letters
    is in the test alone."""
    if config.flip:
        raise UserError("config key data.flip: found True; accepted: False with data.source 'glyphs': mirrored, one letter is another")
    families = tuple(letters.FAMILIES)
    seen = tuple(family for family in families if family not in config.test_families)
    if set(config.test_families) - set(families) or not seen:
        raise UserError(f"config key data.test_families: found {config.test_families!r}; accepted: some of {', '.join(families)}, not all")
    classes, images, examples = config.classes or len(letters.CLASSES), [], []
    if classes > len(letters.CLASSES):
        most = f"at most {len(letters.CLASSES)} (0: all) with data.source 'glyphs'"
        raise UserError(f"config key data.classes: found {classes}; accepted: {most}")
    hidden = held_out(range(classes), config.test) if config.task == "reid" else set()  # identities that do not train
    for at, (part, each, hands) in enumerate(
        (("train", config.per_class, seen), ("test", config.test_per_class, config.test_families or families))
    ):
        drawn = letters.draw(
            classes=classes, size=max(config.stored), count=classes * each, seed=2 * config.seed + at, families=hands
        )  # the parts share no draw
        rows = enumerate(zip(drawn.label.tolist(), drawn.face.tolist(), strict=True))
        kept = [(i, label, face) for i, (label, face) in rows if config.task != "reid" or (label in hidden) == (part == "test")]
        examples += [Example(f"{part} {i}", label, part, face) for i, label, face in kept]
        images.append(drawn.image[[i for i, _, _ in kept]])
    return Listing(examples, Arrays(np.concatenate(images), config.channels), dict(enumerate(drawn.classes)))


def npz(config) -> Listing:
    """Arrays of one file: image (or images, x) uint8 [N, H, W] or [N, H, W, 1 or 3]; label (labels, y) int or text [N]; where there
    are any, camera int [N]; split [N] of train, validation, test, query, gallery; class_names [classes]. `camera` names another array
    for the camera's; `group` an array [N] whose values `test_groups` make the test split."""
    file = os.path.expanduser(config.path)
    try:
        with open(file, "rb") as raw, np.load(raw) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise UserError(f"data.path {config.path!r}: not found; accepted: an .npz file") from None
    except Exception as error:  # zip, pickle or header damage: numpy raises many kinds
        found = (str(error).splitlines() or [""])[0]
        raise UserError(f"data.path {config.path!r}: not a readable .npz file ({type(error).__name__}: {found})") from None
    chosen = {}
    for name, spellings in ARRAYS.items():
        found = [spelling for spelling in spellings if spelling in arrays]
        if not found:
            raise UserError(f"{file}: has {', '.join(arrays) or 'no array'}; accepted: an array {' or '.join(spellings)}")
        chosen[name] = arrays[found[0]]
    image, label = chosen.values()
    if image.dtype != np.uint8 or not (image.ndim == 3 or (image.ndim == 4 and image.shape[-1] in (1, 3))):
        raise UserError(f"{file}: images are {image.dtype} {image.shape}; accepted: uint8 [N, H, W] or [N, H, W, 1 or 3]")
    if 0 in image.shape[1:]:
        raise UserError(f"{file}: images are {image.shape}, without a pixel; accepted: one or more each way")
    _column(file, "labels", label, len(image), "iuU")
    taken_by = _array(config, "camera", file, arrays) if config.camera else arrays.get("camera")
    camera = np.full(len(image), UNKNOWN) if taken_by is None else _column(file, config.camera or "camera", taken_by, len(image), "iu")
    parts = _parts(config, file, arrays, len(image))
    names = arrays.get("class_names")
    if names is not None and (label.dtype.kind == "U" or names.ndim != 1 or (len(label) and label.max() >= len(names))):
        raise UserError(f"{file}: class_names {names.shape} do not name its labels; accepted: one name for each label from 0 on")
    rows = zip(label.tolist(), parts, camera.tolist(), strict=True)
    examples = [Example(f"image {i}", *row) for i, row in enumerate(rows)]  # whatever the file is called: the splits hash it
    if not examples:
        raise UserError(f"{file}: no image in it; accepted: one or more")
    return Listing(examples, Arrays(image, config.channels), {} if names is None else dict(enumerate(map(str, names))))


def _parts(config, file: str, arrays: dict, count: int) -> list[str]:
    """The part of each image: by `group`, else by the array `split`, else not split."""
    if config.group:
        group = _column(file, config.group, _array(config, "group", file, arrays), count, "iuU")
        there = set(group.tolist())
        if missing := [value for value in config.test_groups if value not in there]:
            some = ", ".join(map(repr, sorted(there)[:30]))
            raise UserError(f"config key data.test_groups: found {missing[0]!r}, which no image has; accepted: some of {some}")
        return np.where(np.isin(group, config.test_groups), "test", "train").tolist()
    if "split" in arrays:
        split = _column(file, "split", arrays["split"], count, "U").tolist()
        if odd := set(split) - set(PARTS):
            raise UserError(f"{file}: split {sorted(odd)[0]!r}; accepted: {', '.join(PARTS)}")
        return split
    return [""] * count


def _array(config, key: str, file: str, arrays: dict) -> np.ndarray:
    """The array that data.`key` names."""
    name = getattr(config, key)
    if name not in arrays:
        raise UserError(f"config key data.{key}: found {name!r}; accepted: an array of {file} ({', '.join(arrays)})")
    return arrays[name]


def _column(file: str, name: str, array: np.ndarray, count: int, kinds: str) -> np.ndarray:
    if array.shape != (count,) or array.dtype.kind not in kinds:
        wanted = " or ".join(text for text, kind in (("whole numbers", "i"), ("text", "U")) if kind in kinds)
        raise UserError(f"{file}: {name} is {array.dtype} {array.shape}; accepted: {wanted} [{count}], one for each image")
    return array


def tfds(config) -> Listing:
    """A TFDS dataset, prepared as array_record, with the features `image` and `label`; its own train, validation and test splits."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"data.source 'tfds': {error}; pip install tensorflow-datasets") from None
    try:
        folder = os.path.expanduser(config.path)
        known = os.path.isdir(folder)
        builder = tfds.builder_from_directory(folder) if known else tfds.builder(config.path, file_format="array_record")
        features = builder.info.features
        # Nor is another picture of the record decoded for nothing, as the masks of caltech_birds2011.
        pictures = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
        sources = builder.as_data_source(decoders={name: tfds.decode.SkipDecoding() for name in pictures} or None)
        if not sources:
            raise LookupError("it has no split on disk")
    except Exception as error:  # TFDS raises assertion, key, lookup and its own errors for the same mistake
        found = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"data.path {config.path!r}: no TFDS dataset prepared as array_record ({type(error).__name__}: {found}); "
            "accepted: NAME or folder of one, prepared once by tfds build NAME --file_format=array_record"
        ) from None
    if missing := [name for name in ("image", "label") if name not in features]:
        raise UserError(f"data.path {config.path!r}: its features are {', '.join(features)}, no {missing[0]}; accepted: image and label")
    if features["label"].shape != ():
        raise UserError(f"data.path {config.path!r}: its label has the shape {features['label'].shape}; accepted: one class an image")
    parts = {split: split if split in PARTS else "" for split in sorted(sources)}
    if "" in parts.values() and len(parts) > 1:
        raise UserError(f"data.path {config.path!r}: found the splits {', '.join(parts)}; accepted: {', '.join(PARTS)}, or one alone")
    parts = parts if len(parts) > 1 else dict.fromkeys(parts, "")
    examples, digests, places = [], [], []
    for split, part in parts.items():
        for row in range(len(sources[split])):
            record = sources[split][row]
            examples.append(Example(f"{split} {row}", int(record["label"]), part))
            digests.append(hashlib.sha256(record["image"]).hexdigest())
            places.append((split, row))
    names = dict(enumerate(getattr(features["label"], "names", None) or ()))
    return Listing(examples, Records(sources, tuple(places), tuple(digests), config.channels, config.enough), names)


SOURCES = {"glyphs": glyphs, "npz": npz, "tfds": tfds}
