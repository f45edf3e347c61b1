"""The teacher's side of dcal: a classifier that runs beside the student, or what one said before of each view of each image."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import UserError
from jaxdistill.data import image_batches, images
from jaxdistill.data.image_batches import Views
from jaxdistill.data.teacher_cache import Cache, Options, digest
from jaxdistill.models import classifier
from jaxdistill.recipe import STAND_IN, Outputs

AUGMENTATION = ("size", "resize", "channels", "resized_crop", "flip", "rotate", "shift", "zoom", "shear", "jitter", "erasing",
                "erasing_fill")  # what the pixels of a view depend on, beside the picture  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TeacherConfig(classifier.ModelConfig):
    """The section `teacher`. cache: a folder that python -m jaxdistill.cache has filled: the teacher is then read and not run;
    path, where there is one too, must be of the teacher that was stored."""

    cache: str = ""


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A classifier that runs beside the student, on whatever it sees."""

    model: classifier.Classifier
    data: images.ImageConfig
    sets: images.ImageSet

    views = None
    sharding = property(lambda self: self.model.sharding)
    facts = property(lambda self: self.model.facts)

    def beside(self, split: str) -> None:
        """More arrays that `logits` needs of each image, as `image_batches.batches` takes them."""

    def load(self, place) -> dict:
        """Its part of `frozen(place)`."""
        return {"teacher": self.model.load(place and (lambda name: place(f"teacher/{name}")))}

    def logits(self, frozen: dict, batch: dict) -> dict[str, Any]:
        """Of its branches: targets, which must not move to meet the student."""
        found, _ = self.model.module.apply({"params": frozen["teacher"]}, self.model.normalise(batch["image"]))
        return jax.lax.stop_gradient(found)

    def outputs(self, options: Options) -> Outputs:
        """What is stored of it (recipe.Outputs)."""
        options = _complete(options, self.data)
        views = Views(options.views, options.seed)

        def measure(frozen, batch):
            return {name: value.astype(options.dtype)[:, None] for name, value in self.logits(frozen, batch).items()}

        def take(split, index, view):
            shown = {"views": views, "view": view} if split == "train" and self.data.augmented else {}
            return image_batches.rows(self.sets.splits[split], self.data, index, **shown)

        counts = {split: len(images) for split, images in self.sets.splits.items()}
        return Outputs(
            made=made(self.data, self.sets) | {
                "options": dataclasses.asdict(options), "teacher": self.model.facts, "dtype": jnp.dtype(self.model.module.dtype).name},
            rows=counts, take=take, views=dict.fromkeys(counts, 1) | {"train": options.views}, measure=dict.fromkeys(counts, measure),
            constants=lambda frozen: {}, units=("image", counts), dense=2 * len(self.sets.classes) * options.views,
        )


@dataclasses.dataclass(frozen=True)
class Cached:
    """What a classifier said."""

    cache: Cache
    data: images.ImageConfig

    sharding, outputs = (), None
    facts = property(lambda self: {"cache": self.cache.digest})

    @property
    def views(self) -> Views | None:
        """Those of the images that training must show."""
        stored = self.cache.made["options"]
        return Views(stored["views"], stored["seed"]) if self.data.augmented else None

    def beside(self, split: str):
        return functools.partial(self.cache.rows, split)

    def load(self, place) -> dict:
        return {}

    def logits(self, frozen, batch):
        return {name.removeprefix("cached_"): value.astype(jnp.float32) for name, value in batch.items() if name.startswith("cached_")}


def choose(config, data: images.ImageConfig, sets: images.ImageSet) -> InMemory | Cached:
    """The teacher of a config."""
    chosen = config.teacher.build(TeacherConfig)
    if chosen.cache:
        cache = Cache(chosen.cache)
        cache.check(made(data, sets) | {"dtype": chosen.dtype})
        if chosen.path and not (Path(chosen.path) / STAND_IN).exists():
            cache.check({"teacher": _described(chosen, data, sets).facts})
        return Cached(cache, data)
    if not chosen.path:
        raise UserError("config key teacher.path: found ''; accepted: a folder that a classifier was exported to, or of a Hugging Face ViT")
    return InMemory(_described(chosen, data, sets), data, sets)


def _described(chosen: TeacherConfig, data: images.ImageConfig, sets: images.ImageSet) -> classifier.Classifier:
    return classifier.describe(dataclasses.replace(chosen, head="stored"), "teacher", image=data.size, channels=data.channels,
                               classes=sets.classes)


def made(data: images.ImageConfig, sets: images.ImageSet) -> dict:
    """What a cache and a job must agree in."""
    return {"kind": "classifier", "classes": digest(sets.classes), "data": sets.facts,
            "images": {name: np.asarray(getattr(data, name)).tolist() for name in AUGMENTATION}}


def _complete(options: Options, data: images.ImageConfig) -> Options:
    """With the defaults that depend on the job, and what cannot be done refused."""
    if options.format not in ("", "logits"):
        raise UserError(f"--format: found {options.format!r} with a classifier; accepted: logits")
    options = dataclasses.replace(options, format="logits", dtype=options.dtype or "float32")
    options.check_used()
    if key := data.augmented:
        if options.views == 1:
            raise UserError(f"config key data.{key}: found {getattr(data, key)} with --views=1; accepted: no augmentation, or --views=V, V "
                            "views of each image to be stored, which epochs take in turn")
    elif options.views > 1:
        raise UserError(f"--views: found {options.views} with images that nothing augments; accepted: 1")
    return options
