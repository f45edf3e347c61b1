"""Weights in and out of Hugging Face folders: `config.json` and safetensors, read strictly.

Nothing here knows a model. A model file says where each of its parameters lies on disk (`Stored`).
Pickles (`pytorch_model.bin`, `.pt`) are never opened: unpickling runs code of whoever wrote the file.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives numpy the bfloat16 that safetensors needs)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxdistill import UserError, hub

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_FETCHED = (CONFIG, "*.safetensors", INDEX, "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
            "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt")  # of a model on the hub: never a pickle, never code
SETTLED = 2_000_000_000  # nanoseconds after which a change of a file shows in its times, on any file system
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_FLOATS = ("float32", "bfloat16", "float16", "float64")
_KINDS = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}  # a header's F32, as numpy says it


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a parameter of `shape` lies on disk: in tensor `names`, or in several, stacked on a new first axis.
    transposed: the axes are in reverse order there (torch's Linear is (out, in), its convolution (out, in, rows, columns))."""

    shape: tuple[int, ...]
    names: str | tuple[str, ...]
    transposed: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape on disk."""
        names, shape = ((self.names,), self.shape) if isinstance(self.names, str) else (self.names, self.shape[1:])
        return dict.fromkeys(names, shape[::-1] if self.transposed else shape)


class Header(NamedTuple):
    """What a file says of a tensor before any of it is read; `part[slices]` reads."""

    shape: tuple[int, ...]
    dtype: str
    part: Any


def fetched(path: str, key: str) -> str:
    """The folder of a model that config key `key` names: `path` itself, or, where nothing is there and it may be a name on the hub
    (NAME or ORG/NAME), where that model was downloaded to."""
    if os.path.exists(path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        return path
    try:
        return hub.fetch(functools.partial(_snapshot, path))
    except UserError as error:
        raise UserError(f"config key {key}: found {path!r}, no local folder, and of the hub: {error}; accepted: a folder with {CONFIG} and "
                        f"{WEIGHTS}, or a model's name on the hub") from None


def _snapshot(name: str, *, local_files_only: bool = False) -> str:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=list(_FETCHED), local_files_only=local_files_only)
    except RepositoryNotFoundError:
        raise UserError("it has no such model (or does not show it to everyone)") from None
    except (OSError, ValueError) as error:
        raise UserError((str(error).strip().splitlines() or [type(error).__name__])[0]) from None
    try:
        read_config(folder)
        _weight_files(Path(folder))
    except UserError:  # also where a tokenizer alone was downloaded before
        raise UserError(f"it has no whole {CONFIG} and safetensors of that name") from None
    return folder


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """`config.json` of `folder` as a dict."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise UserError(f"{folder}: found {found}; accepted: a folder with {CONFIG} and {WEIGHTS}")
    return _read_json(folder / CONFIG)


def read_headers(folder: str | os.PathLike) -> dict[str, Header]:
    """Every tensor of `folder`, by its name on disk, from one file or from shards. Reads no weights."""
    files = _weight_files(Path(folder).expanduser())
    index = files.pop(0) if files[0].name == INDEX else None
    headers, home = {}, {}
    for path in files:
        try:
            file = safe_open(path, framework="numpy")
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError) as error:
            why = " ".join(str(error).split())
            raise UserError(f"{path}: not a readable safetensors file ({why}); accepted: a complete one") from None
        for name, part in parts.items():
            if name in home:
                raise UserError(f"{path}: tensor {name} is also in {home[name]}; accepted: each tensor once")
            dtype = re.sub(r"^(F|BF|I|U)(?=\d+$)", lambda kind: _KINDS[kind[0]], part.get_dtype())
            headers[name], home[name] = Header(tuple(part.get_shape()), dtype, part), path.name
    for name, file in _weight_map(index).items() if index else ():
        if home.get(name) != file:
            found = f"in {home[name]}" if name in home else "nowhere"
            raise UserError(f"{index}: tensor {name}: found {found}; accepted: in {file}, as the index says")
    return headers


def load(
    folder: str | os.PathLike,
    stored: Mapping[str, Stored],
    *,
    place: Callable[[str], jax.sharding.Sharding] | None = None,
    prefix: str = "",
    ignore: str = r"(?!)",
    tied: tuple[str, str] | None = None,
    dtype: Callable[[str], Any] = lambda path: np.float32,
) -> dict[str, jax.Array]:
    """Parameter path -> array. All headers are checked before any weight is read; then one parameter at a
    time is on the host, and of that one only the parts that this process's devices hold.

    Args:
      folder: with `model.safetensors`, or an index and shards.
      stored: parameter path -> where it lies.
      place: parameter path -> its sharding; None: whole, on the default device.
      prefix: may stand before a name on disk, or not.
      ignore: regex (full match, without the prefix) of tensors that hold no weights.
      tied: (tensor, other): the first may be there too, if it equals the second.
      dtype: parameter path -> that of its array, whatever the file holds.
    """
    headers = read_headers(folder)
    copy = headers.pop(tied[0], None) if tied else None
    wanted = {name: shape for one in stored.values() for name, shape in one.tensors().items()}
    found = _check(headers, wanted, folder, prefix, ignore)
    if copy and not (copy.shape == found[tied[1]].shape and np.array_equal(copy.part[()], found[tied[1]].part[()])):
        raise UserError(f"{folder}: tensor {tied[0]}: found one unlike {tied[1]}; accepted: a tied head")
    return {path: _read(one, found, dtype(path), place and place(path)) for path, one in stored.items()}


def held(regex: str, dtype: Any) -> Callable[[str], Any]:
    """`dtype` for parameters whose path matches `regex`, float32 for the others."""
    return lambda path: dtype if re.search(regex, path) else np.float32


def dump(stored: Mapping[str, Stored], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `load`: tensor name -> float32 array, of parameters by path; `UserError` where these are not
    those of `stored`."""
    params = {path: np.asarray(x) for path, x in params.items()}
    shapes = {path: one.shape for path, one in stored.items()}
    found = _check(params, shapes, "params", "", r"(?!)")
    tensors = {}
    for path, one in stored.items():
        whole = found[path].astype(np.float32)
        for i, name in enumerate(one.tensors()):
            tensor = whole if isinstance(one.names, str) else whole[i]
            tensors[name] = tensor.T if one.transposed else tensor
    return tensors


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
    """SHA-256 (hex) of the config and weight files of `folder`: names, sizes and bytes. Not of its tokenizer. Read once by each process,
    as long as the files stay what they are."""
    folder = Path(folder).expanduser().absolute()
    read_config(folder)
    files = {path: path.stat() for path in (folder / CONFIG, *_weight_files(folder))}
    state = tuple((path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for path, stat in files.items())
    # What was written just now may be written again without its times moving on: clocks of file systems are coarse.
    settled = max(max(stat.st_mtime_ns, stat.st_ctime_ns) for stat in files.values()) < time.time_ns() - SETTLED
    return (_files_hash if settled else _files_hash.__wrapped__)(state)


@functools.lru_cache(maxsize=64)
def _files_hash(state: tuple) -> str:
    """Of files as `folder_hash` found them: (path, size, ...)."""
    digest = hashlib.sha256()
    for path, size, *_ in state:
        digest.update(f"{path.name} {size}\n".encode())
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


def _check(tensors: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], source: Any, prefix: str, ignore: str) -> dict:
    """`tensors` (arrays or headers) that a model wants, by name without `prefix`, or a `UserError` naming the first key
    that is wrong."""
    found: dict[str, Any] = {}
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
        if str(found[name].dtype) not in _FLOATS:
            raise UserError(f"{source}: tensor {name}: found {found[name].dtype}; accepted: {', '.join(_FLOATS)}")
    return found


def _read(one: Stored, found: Mapping[str, Header], dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """The parameter `one` as an array."""

    stacked = not isinstance(one.names, str)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        whole = np.empty([len(range(size)[axis]) for size, axis in zip(one.shape, index, strict=True)], dtype)
        names, rest = (one.names[index[0]], index[1:]) if stacked else ((one.names,), index)
        for i, name in enumerate(names):
            tensor = found[name].part[rest[::-1] if one.transposed else rest]
            (whole[i] if stacked else whole)[...] = tensor.T if one.transposed else tensor
        return whole

    if sharding is None:  # jnp.array copies: a buffer that JAX owns may be donated, a view of the file may not
        return jnp.array(part((slice(None),) * len(one.shape)))
    done: dict[tuple, np.ndarray] = {}  # devices that hold the same part share it

    def once(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((axis.start, axis.stop) for axis in index)
        if key not in done:
            done[key] = part(index)
        return done[key]

    # Waits, so that the host's copy is gone before the next one is read.
    return jax.block_until_ready(jax.make_array_from_callback(one.shape, sharding, once))


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
