"""A ViT's weights on disk: Hugging Face folders (transformers' `ViTForImageClassification`), folders of ours with more branches
than it has, and the `.npz` files of google-research/vision_transformer. All are read strictly.

Nothing here knows the module: parameters are named by their paths.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxdistill import UserError
from jaxdistill.models import hf

KINDS = ("vit", "jaxdistill_dcal")  # config.json's model_type
PREPROCESSOR = "preprocessor_config.json"
# ViTConfig's fields in a config.json. The last three may be absent: the defaults are transformers' own.
_KEYS = {
    "image": "image_size", "patch": "patch_size", "channels": "num_channels", "width": "hidden_size", "depth": "num_hidden_layers",
    "heads": "num_attention_heads", "inner": "intermediate_size", "eps": "layer_norm_eps", "activation": "hidden_act",
}  # fmt: skip
_DEFAULTS = {"num_channels": 3, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
_REQUIRED = {"qkv_bias": True}  # entries that must have this value where they are present
_NAMES = (  # regexes, parameter path -> tensor name
    (r"^vit/", ""), (r"embed/patch", "embeddings/patch_embeddings/projection"), (r"embed/cls", "embeddings/cls_token"),
    (r"embed/position", "embeddings/position_embeddings"), (r"^block_(\d+)", r"encoder/layer/\1"),
    (r"attention/q", "attention/attention/query"), (r"attention/k", "attention/attention/key"),
    (r"attention/v", "attention/attention/value"), (r"attention/out", "attention/output/dense"), (r"mlp/up", "intermediate/dense"),
    (r"mlp/down", "output/dense"), (r"ln_1", "layernorm_before"), (r"ln_2", "layernorm_after"), (r"ln_f", "layernorm"),
    (r"head", "classifier"), (r"(kernel|scale)$", "weight"), (r"/", "."),
)  # fmt: skip
_GOOGLE = (  # the same for Google's
    (r"^vit/", ""), (r"embed/patch", "embedding"), (r"embed/cls", "cls"), (r"embed/position", "Transformer/posembed_input/pos_embedding"),
    (r"block_(\d+)", r"Transformer/encoderblock_\1"), (r"attention/", "MultiHeadDotProductAttention_1/"), (r"/q/", "/query/"),
    (r"/k/", "/key/"), (r"/v/", "/value/"), (r"mlp/up", "MlpBlock_3/Dense_0"), (r"mlp/down", "MlpBlock_3/Dense_1"),
    (r"ln_1", "LayerNorm_0"), (r"ln_2", "LayerNorm_2"), (r"ln_f", "Transformer/encoder_norm"),
)  # fmt: skip
_HEADS = r"(?:\w+_)?(?:classifier|head)[./].*"


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights on disk, of which nothing but names and shapes was read. sizes: fields of ViTConfig, `classes` 0 where there is
    no head. names: of the classes, where the file has any. mean, std: of its images, where it says. branches: entries of
    config.json of a folder of ours, else None. digest: SHA-256 of the weights and what describes them."""

    path: str
    sizes: dict
    names: tuple[str, ...] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    branches: dict | None
    digest: Callable[[], str]


def open_source(path: str | os.PathLike) -> Source:
    """A Hugging Face folder, or one of Google's `.npz` files."""
    path = Path(path).expanduser()
    return _open_npz(path) if path.suffix == ".npz" else _open_folder(path)


def read(source: Source, shapes: Mapping[str, tuple], grid: tuple[int, int], place: Callable | None) -> dict[str, jax.Array]:
    """Parameter path -> float32 array, for the paths of `shapes`. What lies on disk beyond them is an error, but for a pooler
    and for heads, which the caller leaves out where it makes its own. grid: of patches, to which positions are resized."""
    image, patch = source.sizes["image"], source.sizes["patch"]
    stored = (image[0] // patch, image[1] // patch)
    position = next(path for path in shapes if path.endswith("embed/position"))
    width = shapes[position][-1]
    shapes = {**shapes, position: (1, 1 + stored[0] * stored[1], width)}
    read_one = _read_npz if source.path.endswith(".npz") else _read_folder
    whole = lambda path: place(path) if path != position or stored == grid else None  # noqa: E731
    with jax.ensure_compile_time_eval():  # numbers also while shapes alone are traced: `resize` is not JAX's
        params = read_one(source, shapes, place and whole)
    if stored != grid:
        resized = resize(np.asarray(params[position]), stored, grid)
        params[position] = jax.device_put(resized, place(position)) if place else jnp.array(resized)
    return params


def write(folder: str | os.PathLike, sizes: Mapping, shapes: Mapping, params: dict, names: tuple[str, ...] | None, config: Mapping) -> None:
    """Write a folder of `params`; sizes: the fields of ViTConfig. names: of the classes."""
    names = tuple(names) if names else tuple(f"LABEL_{i}" for i in range(sizes["classes"]))
    if len(names) != sizes["classes"] or len(set(names)) != len(names):
        raise UserError(f"names: found {len(names)} names of classes, {len(set(names))} of them unlike; accepted: {sizes['classes']}")
    own = _REQUIRED | {"model_type": "vit", "architectures": ["ViTForImageClassification"], "dtype": "float32"}
    own |= {theirs: sizes[ours] for ours, theirs in _KEYS.items()}
    rows, columns = sizes["image"]
    own |= {"image_size": rows if rows == columns else [rows, columns], "intermediate_size": sizes["inner"] or 4 * sizes["width"]}
    own |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    own |= {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {name: i for i, name in enumerate(names)}}
    branches = config.get("branches")
    if branches is not None:
        own |= {"model_type": "jaxdistill_dcal", "architectures": ["DCAL"]}
    for key in config.keys() & own.keys():
        raise UserError(f"{key}: found {config[key]!r}; accepted: only entries that the model does not set itself")
    tensors = hf.dump(_stored(shapes), flatten_dict(params, sep="/"))
    inner = re.compile(r"(embeddings|encoder|layernorm)\.")
    tensors = {("vit." if inner.match(name) else "") + name: tensor for name, tensor in tensors.items()}
    hf.write_folder(folder, dict(config) | own, tensors)


def write_preprocessor(folder: str | os.PathLike, image: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """What transformers' `ViTImageProcessor` must know to make the same numbers of an image."""
    entries = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": image[0], "width": image[1]},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(mean), "image_std": list(std),
    }  # fmt: skip
    (Path(folder) / PREPROCESSOR).write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")


def resize(position: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Position embeddings [1, 1 + rows * columns, width] of the grid `old`, for the grid `new`: the CLS row is kept, the others
    pass through torch's `interpolate(mode="bicubic", align_corners=False)`, which is what transformers does."""
    cls, patches = position[:, :1], position[0, 1:].reshape(*old, -1).astype(np.float64)
    rows, columns = _bicubic(old[0], new[0]), _bicubic(old[1], new[1])
    patches = np.einsum("ir,jc,rcd->ijd", rows, columns, patches, optimize=True)
    return np.concatenate([cls, patches.reshape(1, new[0] * new[1], -1)], axis=1).astype(np.float32)


def _bicubic(old: int, new: int) -> np.ndarray:
    """[new, old]: Keys's (1981) cubic convolution with a = -0.75, at half-pixel centres, edges repeated, no antialiasing."""
    a, weights = -0.75, np.zeros((new, old))
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5
    left = np.floor(centre).astype(int)
    for tap in (-1, 0, 1, 2):
        x = np.abs(centre - left - tap)
        near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(weights, (np.arange(new), np.clip(left + tap, 0, old - 1)), np.where(x <= 1, near, far))
    return weights


def _rename(path: str, table: tuple) -> str:
    for ours, theirs in table:
        path = re.sub(ours, theirs, path)
    return path


def _stored(shapes: Mapping[str, tuple]) -> dict[str, hf.Stored]:
    """torch's Linear is (out, in), its convolution (out, in, rows, columns): our kernels in reverse order."""
    return {path: hf.Stored(shape, _rename(path, _NAMES), transposed=path.endswith("kernel")) for path, shape in shapes.items()}


def _open_folder(folder: Path) -> Source:
    raw, file = hf.read_config(folder), f"{folder}/{hf.CONFIG}"
    model = raw.get("model_type")
    if model not in list(KINDS):
        raise UserError(f"{file}: model_type: found {model!r}; accepted: {', '.join(KINDS)}")
    for key, accepted in _REQUIRED.items():
        if raw.get(key, accepted) != accepted:
            raise UserError(f"{file}: {key}: found {raw[key]!r}; accepted: {accepted!r}")
    raw = _DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    for key in sorted(_KEYS.values() - raw.keys()):
        raise UserError(f"{file}: {key}: found nothing; accepted: the entry of a ViT's config")
    sizes = {ours: raw[theirs] for ours, theirs in _KEYS.items()}
    sizes["image"] = tuple(sizes["image"]) if isinstance(sizes["image"], list) else (sizes["image"], sizes["image"])
    if isinstance(sizes["patch"], list) and len(set(sizes["patch"])) == 1:
        sizes["patch"] = sizes["patch"][0]
    for key, value in sizes.items():
        kind, accepted = {"eps": (float, "a number"), "activation": (str, "a name")}.get(key, (int, "an integer"))
        if not all(type(one) is kind for one in (value if key == "image" else (value,))):
            raise UserError(f"{file}: {_KEYS[key]}: found {raw[_KEYS[key]]!r}; accepted: {accepted}")
    head = hf.read_headers(folder).get("classifier.weight")
    sizes["classes"] = head.shape[0] if head and head.shape else 0
    names = _names(raw.get("id2label"), file)
    if names and sizes["classes"] not in (0, len(names)):
        raise UserError(f"{file}: id2label: found {len(names)} classes; accepted: the {sizes['classes']} of classifier.weight")
    branches = raw.get("branches")
    if (model == "vit") != (branches is None) or not isinstance(branches, dict | None):
        raise UserError(f"{file}: branches: found {branches!r}; accepted: an object where model_type is jaxdistill_dcal, else nothing")
    mean, std = _normalisation(folder / PREPROCESSOR)
    return Source(str(folder), sizes, names if sizes["classes"] else None, mean, std, branches, lambda: hf.folder_hash(folder))


def _names(labels: Any, file: str) -> tuple[str, ...] | None:
    """id2label in the order of the classes; transformers' own LABEL_0, LABEL_1... are no names."""
    if labels is None:
        return None
    try:
        names = tuple(str(labels[str(i)]) for i in range(len(labels)))
    except (KeyError, TypeError):
        raise UserError(f"{file}: id2label: found {str(labels)[:60]}; accepted: an object of \"0\", \"1\"... -> name") from None
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def _normalisation(file: Path) -> tuple:
    """(mean, std) of a preprocessor_config.json, (None, None) where it is absent or silent."""
    if not file.exists():
        return None, None
    try:
        raw = json.loads(file.read_text())
        if not raw.get("do_normalize", True):
            return (0.0,), (1.0,)
        pair = [raw.get(key) and tuple(float(x) for x in raw[key]) for key in ("image_mean", "image_std")]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{file}: not readable ({why}); accepted: a JSON object with image_mean and image_std") from None
    return (None, None) if None in pair else tuple(pair)


def _read_folder(source: Source, shapes: Mapping[str, tuple], place: Callable | None) -> dict[str, jax.Array]:
    heads = any(re.fullmatch(_HEADS, _rename(path, _NAMES)) for path in shapes)
    ignore = r"pooler\.dense\.(weight|bias)" + ("" if heads else f"|{_HEADS}")
    return hf.load(source.path, _stored(shapes), place=place, prefix="vit.", ignore=ignore)


def _open_npz(file: Path) -> Source:
    shapes = {name: array.shape for name, array in _arrays(file).items()}
    block = "Transformer/encoderblock_0/"
    names = {
        "patch": "embedding/kernel", "position": "Transformer/posembed_input/pos_embedding", "inner": f"{block}MlpBlock_3/Dense_0/bias",
        "heads": f"{block}MultiHeadDotProductAttention_1/query/bias",
    }  # fmt: skip
    found = {}
    for (key, name), axes in zip(names.items(), (4, 3, 1, 2), strict=True):
        if len(shapes.get(name, ())) != axes:
            raise UserError(f"{file}: {name}: found {shapes.get(name, 'nothing')}; accepted: an array of {axes} axes, as Google's ViT has")
        found[key] = shapes[name]
    side = math.isqrt(found["position"][1] - 1)
    if side * side != found["position"][1] - 1:
        raise UserError(f"{file}: {names['position']}: found {found['position']}; accepted: CLS and a square of patches")
    patch, _, channels, width = found["patch"]
    blocks = {name.split("/")[1] for name in shapes if name.startswith("Transformer/encoderblock_")}
    # flax's nn.gelu is the tanh form, its LayerNorm's epsilon 1e-6: Google's code changes neither.
    sizes = dict(image=(side * patch, side * patch), patch=patch, channels=channels, width=width, depth=len(blocks),
                 heads=found["heads"][0], inner=found["inner"][0], eps=1e-6, activation="gelu_pytorch_tanh",
                 classes=(shapes.get("head/bias") or (0,))[0])  # fmt: skip
    return Source(str(file), sizes, None, None, None, None, lambda: hashlib.sha256(file.read_bytes()).hexdigest())


def _arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with file.open("rb") as opened, zipfile.ZipFile(opened):  # refused here: numpy leaves open what it cannot read
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{file}: not readable ({why}); accepted: an .npz of arrays, as of google-research/vision_transformer") from None


def google_shapes(shapes: Mapping[str, tuple], heads: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter path -> its name and shape in Google's layout. Heads have an axis of their own there."""
    table = {}
    for path, shape in shapes.items():
        if path.endswith("patch/kernel"):
            shape = (shape[1], shape[0], *shape[2:])
        elif re.search(r"attention/[qkv]/", path):
            shape = (*shape[:-1], heads, shape[-1] // heads)
        elif path.endswith("attention/out/kernel"):
            shape = (heads, shape[0] // heads, shape[1])
        table[path] = (_rename(path, _GOOGLE), shape)
    return table


def _read_npz(source: Source, shapes: Mapping[str, tuple], place: Callable | None) -> dict[str, jax.Array]:
    arrays, params = _arrays(Path(source.path)), {}
    if not any(re.fullmatch(_HEADS, path.removeprefix("vit/")) for path in shapes):  # a layer before the head goes with it
        arrays = {name: array for name, array in arrays.items() if not re.match(r"(head|pre_logits)/", name)}
    for path, (name, shape) in google_shapes(shapes, source.sizes["heads"]).items():
        array = arrays.pop(name, None)
        if array is None or array.shape != shape or array.dtype.kind != "f":
            found = "nothing" if array is None else f"{array.dtype} {array.shape}"
            raise UserError(f"{source.path}: {name}: found {found}; accepted: floats of shape {shape}")
        array = array.swapaxes(0, 1) if path.endswith("patch/kernel") else array
        array = np.ascontiguousarray(array, dtype=np.float32).reshape(shapes[path])
        sharding = place and place(path)
        params[path] = jax.device_put(array, sharding) if sharding else jnp.array(array)
    if arrays:
        raise UserError(f"{source.path}: {min(arrays)}: found {len(arrays)} arrays that a ViT does not have; accepted: none "
                        "(pre_logits goes with the stored head, which a new one replaces)")
    return params
