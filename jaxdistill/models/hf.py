"""Weights in and out of Hugging Face folders: `config.json` and safetensors, read strictly.

Nothing here knows a model. A model file says which tensors it wants (`select`) and how they are named.
Pickles (`pytorch_model.bin`, `.pt`) are never opened: unpickling runs code of whoever wrote the file.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (gives numpy the bfloat16 that safetensors needs)
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxdistill import UserError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_FLOATS = ("float32", "bfloat16", "float16", "float64")


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """`config.json` of `folder` as a dict."""
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise UserError(f"{folder}: found {found}; accepted: a folder with {CONFIG} and {WEIGHTS}")
    return _read_json(folder / CONFIG)


def read_tensors(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every tensor of `folder`, by its name on disk and in its dtype on disk, from one file or from shards."""
    files = _weight_files(Path(folder))
    index = files.pop(0) if files[0].name == INDEX else None
    tensors, home = {}, {}
    for path in files:
        try:
            loaded = load_file(path)
        except (SafetensorError, OSError, TypeError, KeyError) as error:
            why = " ".join(str(error).split())
            raise UserError(f"{path}: not a readable safetensors file ({why}); accepted: a complete one") from None
        for name, tensor in loaded.items():
            if name in home:
                raise UserError(f"{path}: tensor {name} is also in {home[name]}; accepted: each tensor once")
            tensors[name], home[name] = tensor, path.name
    for name, file in _weight_map(index).items() if index else ():
        if home.get(name) != file:
            found = f"in {home[name]}" if name in home else "nowhere"
            raise UserError(f"{index}: tensor {name}: found {found}; accepted: in {file}, as the index says")
    return tensors


def select(
    tensors: Mapping[str, np.ndarray],
    wanted: Mapping[str, tuple[int, ...]],
    *,
    source: str | os.PathLike,
    prefix: str = "",
    ignore: str = r"(?!)",
) -> dict[str, np.ndarray]:
    """The tensors that a model wants, as float32, or a `UserError` naming the first key that is wrong.

    Args:
      tensors: what was read, by name on disk.
      wanted: name -> shape, of all that the model has; names without `prefix`.
      source: the folder, for the error's line.
      prefix: may stand before a name on disk, or not.
      ignore: regex (full match, without the prefix) of tensors that hold no weights.
    """
    found: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(prefix)
        if name in found:
            raise UserError(f"{source}: tensor {name}: found with and without the prefix {prefix}; accepted: once")
        if name in wanted or not re.fullmatch(ignore, name):
            found[name] = tensor
    for kind, names in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{source}: tensor {min(names)}{more}: {kind}; found {len(found)} tensors, "
                f"accepted: exactly the {len(wanted)} that {CONFIG} describes"
            )
    for name, shape in wanted.items():
        if found[name].shape != tuple(shape):
            raise UserError(f"{source}: tensor {name}: found shape {found[name].shape}; accepted: {tuple(shape)}")
        if found[name].dtype.name not in _FLOATS:
            raise UserError(f"{source}: tensor {name}: found {found[name].dtype}; accepted: {', '.join(_FLOATS)}")
    return {name: found[name].astype(np.float32) for name in wanted}


def write_folder(folder: str | os.PathLike, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write `config.json` and `model.safetensors`, each to a temporary name that is renamed when complete."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights, text = folder / f".{WEIGHTS}.tmp", folder / f".{CONFIG}.tmp"
        arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        save_file(arrays, weights, metadata={"format": "pt"})  # transformers refuses a file without a format
        text.write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
        weights.chmod(text.stat().st_mode & 0o777)  # safetensors makes files that only their owner reads
        os.replace(weights, folder / WEIGHTS)
        os.replace(text, folder / CONFIG)
    except (OSError, SafetensorError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{folder}: cannot be written ({why}); accepted: a writable folder, or a new one") from None


def folder_hash(folder: str | os.PathLike) -> str:
    """SHA-256 (hex) of the config and weight files of `folder`: names, sizes and bytes. Not of its tokenizer."""
    folder = Path(folder)
    read_config(folder)
    digest = hashlib.sha256()
    for path in (folder / CONFIG, *_weight_files(folder)):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def params_hash(params: Any) -> str:
    """SHA-256 (hex) of a pytree of arrays: paths, dtypes, shapes and bytes, in the order of the paths."""
    digest, keystr = hashlib.sha256(), jax.tree_util.keystr
    leaves = {keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    for name, leaf in sorted(leaves.items()):
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; accepted: a Hugging Face folder, which holds {path.name}") from None
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{path}: not readable as JSON ({why}); accepted: a JSON object") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a JSON {type(value).__name__}; accepted: a JSON object")
    return value


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, of a sharded folder's index."""
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{index}: weight_map: found {files!r}; accepted: an object of tensor -> file name")
    for name, file in files.items():  # a plain name: an index may not point out of its folder
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index}: weight_map: {name}: found {file!r}; accepted: a .safetensors file beside it")
    return files


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: one, or the index and its shards."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if index.exists():
        shards = [folder / name for name in sorted(set(_weight_map(index).values()))]
        for shard in shards:
            if not shard.exists():
                raise UserError(f"{shard}: not found; accepted: every file that {INDEX} names")
        return [index, *shards]
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
    found = f"found only {pickles[0]}, a pickle, which is never opened" if pickles else "no weights found"
    raise UserError(f"{folder}: {found}; accepted: {WEIGHTS}, or {INDEX} with its shards")
