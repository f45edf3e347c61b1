"""The run manifest: packages, revision, device, parameter table, and what the recipe was built from."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import jax

import jaxdistill
from jaxdistill.training import optim

PACKAGES = ("jaxdistill", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "transformers")


def describe(built, ready) -> dict:
    params = ready.abstract.params
    shapes = [
        {"name": optim.path_name(path), "shape": list(leaf.shape), "dtype": str(leaf.dtype), "group": group.name}
        for (path, leaf), group in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(ready.groups), strict=True)
    ]
    return {
        "command": sys.argv, "python": platform.python_version(), "packages": _versions(), "git": _revision(),
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), "processes": jax.process_count(),
                   "mesh": dict(ready.mesh.shape)},
        "facts": built.recipe.facts, "groups": optim.table(params, ready.groups), "parameters": shapes,
    }


def _versions() -> dict:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _revision() -> str | None:
    """The revision of the checkout the package runs from, or None where it is installed."""
    where = Path(jaxdistill.__file__).parent
    try:
        return subprocess.run(["git", "-C", where, "describe", "--always", "--dirty", "--abbrev=40"],
                              capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
