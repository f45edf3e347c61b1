"""An image classifier from a config section: a ViT with the branches of DCAL or without, from weights on disk or from sizes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxdistill import UserError
from jaxdistill.models import vit, vit_files
from jaxdistill.models.causal import DTYPES
from jaxdistill.models.dcal import DCAL, PLAIN, Branches

_SIZES = ("patch", "width", "depth", "heads")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A section `model`, `student` or `teacher`.

    path: a Hugging Face ViT folder, a folder that this project exported, or one of Google's .npz files, whose sizes and weights
    are taken; "": a fresh model of `preset`, with the sizes that are not 0 in place of the preset's.
    mean, std: of the normalisation (x / 255 - mean) / std, one number or one a channel; (): those of the folder's
    preprocessor_config.json, else 0.5 (the recipe gives a fresh model those of its images). head: "new", for the data's classes,
    or "stored".
    """

    path: str = ""
    preset: str = "tiny"
    patch: int = 0
    width: int = 0
    depth: int = 0
    heads: int = 0
    drop_path: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    head: str = "new"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """module: a DCAL, apply({"params": params}, normalise(images), partner=, key=) -> (logits by stream, features). init: (key) ->
    params, from disk where there is a path, what is new with the key. load: (place) -> params all from disk, each straight into
    the sharding place(path). save: (params, folder) -> None. decay: regex of the parameters for weight decay. facts: JSON, with
    the content hash of what is on disk. classes: their names, in the order of the logits."""

    module: DCAL
    init: Callable
    load: Callable
    sharding: tuple
    decay: str
    facts: dict
    parameters: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, images: UInt8[Array, "batch rows columns channels"]) -> Float[Array, "batch rows columns channels"]:
        """(x / 255 - mean) / std, in float32."""
        axis = (None, None, None, slice(None))
        mean, std = (jnp.asarray(x, jnp.float32)[axis] for x in (self.mean, self.std))
        return (images.astype(jnp.float32) / 255 - mean) / std

    def save(self, params: dict, folder: str | Path) -> None:
        """A Hugging Face ViT folder; where there are parameters that a ViT does not have, a folder of ours, which `describe`
        reads. With a preprocessor_config.json that says how images are normalised."""
        c, b = self.module.vit, self.module.branches
        more = {"branches": dataclasses.asdict(b)} if b.glca or b.pwca == "own" else {}
        vit_files.write(folder, dataclasses.asdict(c), vit.shapes(self.module), params, self.classes, more)
        vit_files.write_preprocessor(folder, c.image, self.mean, self.std)


def describe(
    config: ModelConfig, key: str, *, image: tuple[int, int], channels: int, classes: tuple[str, ...], branches: Branches | None = None
) -> Classifier:
    """The classifier of section `key`, for images [*image, channels] of `classes`; weights are read only by `init` and `load`.

    branches: None: those of the folder, none of a plain ViT. A plain ViT may be given branches: they are new. UserError where
    the section is no model, or one that does not fit the images, the classes or the branches."""
    for name, accepted in (("dtype", DTYPES), ("preset", vit.PRESETS), ("head", ("new", "stored"))):
        if getattr(config, name) not in accepted:
            raise UserError(f"config key {key}.{name}: found {getattr(config, name)!r}; accepted: {', '.join(accepted)}")
    if config.head == "stored" and not config.path:
        raise UserError(f"config key {key}.head: found 'stored' without {key}.path; accepted: 'new'")
    source = vit_files.open_source(config.path) if config.path else None
    stored = _stored_branches(source)
    try:
        sizes = _from_disk(config, source, image, channels, classes) if source else _fresh(config, image, channels, classes)
        branches = _fitting(branches, stored)
        module = DCAL(sizes, branches, DTYPES[config.dtype], config.remat)
    except UserError as error:
        raise UserError(f"config key {key}.{error}") from None
    mean, std = (_channels(config, source, key, name, channels) for name in ("mean", "std"))

    def is_new(path: str) -> bool:
        return (stored is None and not path.startswith("vit/")) or (config.head == "new" and "head/" in path)

    def load(place: Callable | None = None, key: jax.Array | None = None) -> dict:
        return vit.load(source, module, fresh=is_new, key=key, place=place)

    facts = {"vit": dataclasses.asdict(sizes), "branches": dataclasses.asdict(branches), "mean": mean, "std": std}
    return Classifier(
        module=module, init=(lambda key: load(key=key)) if source else (lambda key: vit.initialise(module, key)), load=load,
        sharding=vit.SHARDING, decay=vit.DECAY, facts=facts | ({"weights": source.digest(), "head": config.head} if source else {}),
        parameters=sum(int(np.prod(shape)) for shape in vit.shapes(module).values()), classes=tuple(classes), mean=mean, std=std,
    )  # fmt: skip


def _from_disk(config: ModelConfig, source: vit_files.Source, image, channels, classes) -> vit.ViTConfig:
    for size in _SIZES:
        if getattr(config, size) not in (0, source.sizes[size]):
            raise UserError(f"{size}: found {getattr(config, size)}; accepted: 0, or the {source.sizes[size]} of {source.path}")
    if source.sizes["channels"] != channels:
        raise UserError(f"path: found a model of {source.sizes['channels']} channels in {source.path}; accepted: {channels}, as the images")
    count = None
    if config.head == "new":
        count = len(classes)
    elif not source.sizes["classes"]:
        raise UserError(f"head: found 'stored', and no head in {source.path}; accepted: 'new'")
    elif source.sizes["classes"] != len(classes):
        raise UserError(f"path: found {source.sizes['classes']} classes in {source.path}; accepted: the data's {len(classes)}")
    elif source.names and source.names != tuple(classes):
        i = next(i for i, (ours, theirs) in enumerate(zip(classes, source.names, strict=True)) if ours != theirs)
        raise UserError(f"path: found {source.names[i]!r} as class {i} of {source.path}; accepted: the data's, {classes[i]!r}")
    try:
        return vit.config_of(source, image=image, classes=count, drop_path=config.drop_path)
    except UserError as error:
        raise UserError(f"path: {error}") from None


def _fresh(config: ModelConfig, image, channels, classes) -> vit.ViTConfig:
    sizes = vit.PRESETS[config.preset] | {size: getattr(config, size) for size in _SIZES if getattr(config, size)}
    return vit.ViTConfig(image=tuple(image), channels=channels, classes=len(classes), drop_path=config.drop_path, **sizes)


def _stored_branches(source: vit_files.Source | None) -> Branches | None:
    """The branches of a folder of ours; None of anything else."""
    if source is None or source.branches is None:
        return None
    try:
        return Branches(**source.branches)
    except (TypeError, UserError) as error:
        raise UserError(f"{source.path}/config.json: branches: {' '.join(str(error).split())}; accepted: what save writes") from None


def _fitting(branches: Branches | None, stored: Branches | None) -> Branches:
    """The branches that were asked for, or else those on disk, which must hold the same parameters."""
    if branches is None or stored is None:
        return branches or stored or PLAIN
    for name, found, asked in (("glca", stored.glca, branches.glca), ("pwca", stored.pwca == "own", branches.pwca == "own")):
        if found != asked:
            raise UserError(f"path: found a model {'with' if found else 'without'} its own {name}; accepted: as the branches asked for")
    return branches


def _channels(config: ModelConfig, source: vit_files.Source | None, key: str, name: str, channels: int) -> tuple[float, ...]:
    """Mean or std, one number a channel."""
    found = getattr(config, name) or (source and getattr(source, name)) or (0.5,)
    if len(found) not in (1, channels) or (name == "std" and min(found) <= 0):
        accepted = f"1 or {channels} numbers" + (", above 0" if name == "std" else "")
        raise UserError(f"config key {key}.{name}: found {tuple(found)}; accepted: {accepted}")
    return tuple(float(x) for x in found) * (channels if len(found) == 1 else 1)
