"""From a list of images to the images of training, validation and test.

Whatever a source does not split is drawn by the hash of names: the same on every machine, whatever the seed of a run, and an
image keeps its side when others are added. Validation comes out of the training images; the test is left alone.

Classification draws within each class. Re-identification draws whole identities; each image of a drawn identity is then a query once
and in the gallery once: it cannot find its own copy, which is of its own camera.
"""

from collections import defaultdict

import numpy as np

from jaxdistill import UserError
from jaxdistill.data.group_splits import held_out
from jaxdistill.data.image_layouts import Example


def assign(examples: list[Example], config) -> tuple[dict[str, list[int]], int]:
    """({part: places in `examples`}, number of training images left out as junk): parts "train", "validation", "test" and, of re-ID
    sets that tell them apart, "query" and "gallery".

    Raises:
      UserError: an empty part, or (classification) a class that no training image shows.
    """
    parts = defaultdict(list)
    for i, example in enumerate(examples):
        parts[example.part].append(i)
    reid = config.task == "reid"
    if parts[""]:
        _draw(examples, parts, "", "test", config.test, reid)
        parts["train"] += parts.pop("")
    junk = [i for i in parts["train"] if reid and _junk(examples[i].label)]
    parts["train"] = [i for i in parts["train"] if not (reid and _junk(examples[i].label))]
    if config.classes:
        kept = set(sorted({examples[i].label for i in parts["train"]})[: config.classes])
        for part in ("train",) if reid else ("train", "validation", "test"):
            parts[part] = [i for i in parts[part] if examples[i].label in kept]
    if not parts["validation"]:
        _draw(examples, parts, "train", "validation", config.validation, reid)
    _check(examples, parts, config, reid)
    return {part: places for part, places in parts.items() if places}, len(junk)


def columns(examples: list[Example], parts: dict[str, list[int]], config) -> dict[str, dict[str, np.ndarray]]:
    """split -> places, labels, cameras int32 and gallery bool [N]. Labels are class indices where the split is of classification or
    trains, else identities (of named ones, places among all names)."""
    reid = config.task == "reid"
    classes = {label: i for i, label in enumerate(sorted({examples[i].label for i in parts["train"]}))}
    names = {example.label for example in examples}
    identities = {label: i for i, label in enumerate(sorted(names))} if any(isinstance(name, str) for name in names) else None
    splits = {}
    for split in ("train", "validation", "test"):
        places = parts.get(split, [])
        gallery = np.zeros(len(places), bool)
        if reid and split != "train":
            both, query, held = places, parts.get("query", []), parts.get("gallery", [])
            query, held = (query, held) if split == "test" else ([], [])
            gallery = np.repeat([False, True], [len(both) + len(query), len(both) + len(held)])
            places = both + query + both + held
        if not places:
            continue
        labels = [examples[i].label for i in places]
        if split == "train" or not reid:
            labels = [classes[label] for label in labels]
        elif identities:
            labels = [-1 if _junk(label) else identities[label] for label in labels]
        cameras = _whole([examples[i].camera for i in places], "camera", examples, places)
        unknown = cameras < 0
        if reid and unknown.any() and not unknown.all():
            name = examples[places[int(unknown.argmax())]].name
            raise UserError(f"{name}: found no camera, where other {split} images have one; accepted: cameras of all images, or of none")
        if unknown.any():  # each image then counts as taken by a camera of its own: only itself is excluded
            cameras = np.asarray(places, np.int32)
        labels = _whole(labels, "identity", examples, places)
        if reid and split != "train" and not _matches(labels, cameras, gallery):
            raise UserError(f"{examples[places[0]].name} and the other {split} images: none of {(~gallery).sum()} queries has an image "
                            "of its identity in the gallery that another camera took; accepted: at least one that has")
        splits[split] = {"places": np.asarray(places), "labels": labels, "cameras": cameras, "gallery": gallery}
    return splits


def _whole(numbers: list[int], what: str, examples, places) -> np.ndarray:
    """int32 [N], which JAX computes with; a larger number would silently become another one."""
    found = np.asarray(numbers, np.int64)
    if (beyond := np.abs(found) > np.iinfo(np.int32).max).any():
        at = int(beyond.argmax())
        raise UserError(f"{examples[places[at]].name}: {what} {found[at]}; accepted: numbers below 2^31")
    return found.astype(np.int32)


def _matches(labels, cameras, gallery) -> bool:
    """Whether any query has an image of its identity by another camera in the gallery."""
    cameras_of = defaultdict(set)
    for label, camera in zip(labels[gallery].tolist(), cameras[gallery].tolist(), strict=True):
        cameras_of[label].add(camera)
    return any(label >= 0 and cameras_of[label] - {camera}
               for label, camera in zip(labels[~gallery].tolist(), cameras[~gallery].tolist(), strict=True))


def _draw(examples, parts, source: str, target: str, share: float, reid: bool) -> None:
    """Moves a share of parts[source] to parts[target]."""
    by_label = defaultdict(list)
    for i in parts[source]:
        by_label[examples[i].label].append(i)
    if reid:
        chosen = held_out((label for label in by_label if not _junk(label)), share)
        drawn = {i for label in chosen for i in by_label[label]}
    else:
        drawn = set()
        for places in by_label.values():
            at = {examples[i].name: i for i in places}
            drawn |= {at[name] for name in held_out(at, share)}
    parts[target] = parts[target] + [i for i in parts[source] if i in drawn]
    parts[source] = [i for i in parts[source] if i not in drawn]


def _junk(label) -> bool:
    return label == "-1" if isinstance(label, str) else label < 0  # as a folder is called


def _check(examples, parts, config, reid: bool) -> None:
    counts = ", ".join(f"{part} {len(places)}" for part, places in parts.items() if part)
    where = f"data.path {config.path!r}" if config.path else f"data.source {config.source!r}"
    labels = {part: {examples[i].label for i in places} for part, places in parts.items()}
    if len(labels["train"]) < 2:
        raise UserError(f"{where}: {len(labels['train'])} classes to train on ({counts}); accepted: two or more")
    labels_of = {examples[i].label for part in parts.values() for i in part}
    if not reid and (odd := sorted(label for label in labels_of if not isinstance(label, str) and label < 0)):
        raise UserError(f"{where}: label {odd[0]} in classification; accepted: labels from 0 on (less than 0 is junk, of task 'reid')")
    if not reid and (parts["query"] or parts["gallery"]):
        raise UserError(f"{where}: query and gallery images ({counts}); accepted: data.task 'reid'")
    if config.validation and not parts["validation"]:
        raise UserError(f"config key data.validation: found {config.validation}, and no class has two images; accepted: 0, or more images")
    if reid and bool(parts["query"]) != bool(parts["gallery"]):
        raise UserError(f"{where}: query without gallery, or gallery without query ({counts}); accepted: both")
    if not parts["test"] and not (reid and parts["query"]):
        raise UserError(f"{where}: no test images ({counts}); accepted: a set with test images, or without any split (data.test draws one)")
    for part in () if reid else ("validation", "test"):
        if unseen := sorted(labels.get(part, set()) - labels["train"]):
            raise UserError(f"{where}: {part} class {unseen[0]!r} has no training image ({len(unseen)} such); accepted: classes that train")
