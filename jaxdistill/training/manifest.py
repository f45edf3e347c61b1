"""The run manifest: packages, revision, device, parameter table, what the recipe was built from, and what its first batch shows."""

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import jax

import jaxdistill
from jaxdistill.training import optim
from jaxdistill.training.metrics import write_json

PACKAGES = ("jaxdistill", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "transformers")


TEXT = 2000  # characters that are kept of the first batch
# What a recipe's `preflight` may tell; null where it cannot.
KEYS = {
    "classes": None,  # or tokens of the vocabulary
    "uniform_nll": None,  # log of it, nats: what knowing nothing costs
    "train_rows": None,
    "valid": None,  # share of the first batch's positions that have a label, of sequences of labels
    "splits": {},  # name -> rows
    "leaks": None,  # rows or groups that two splits share; [] if none
    "unseen_classes": [],  # of validation or test, that never train
    "input": None,  # of the first training batch as the model sees it: abs_max, mean_abs, std_max (largest deviation of a column)
    "reachable": None,  # which options bound the predictions, and how far the targets go
}


def preflight(ready, gates, variables, host: dict) -> dict:
    """What can be told before the first update. variables: those that it begins with. host: the first batch, on this process."""
    built, recipe = ready.built, ready.built.recipe
    told = recipe.preflight(variables, host) if recipe.preflight else {}
    if unknown := told.keys() - KEYS.keys():
        raise ValueError(f"preflight tells {sorted(unknown)}; accepted: {', '.join(KEYS)}")
    text = recipe.describe(host) if recipe.describe else ""
    return {
        "steps": built.train.steps, "batch": built.train.batch, **KEYS, **told,
        "no_term": [leaf for leaf, terms in zip(gates.leaves, gates.reach, strict=True) if not terms],
        "first_batch": text if len(text) <= TEXT else text[: TEXT - 4] + "\n...",
        "initial": None, "teacher": None,  # of the first update: see `begun`
    }


def begun(folder: Path, line: dict) -> None:
    """Adds to the preflight what the first update showed, whose parameters are still the initial ones: loss, raw terms and probes."""
    found = json.loads((folder / "manifest.json").read_text())["preflight"]
    probes = line["probes"]
    teacher = {"nll": probes["teacher_nll"], "uniform_nll": found["uniform_nll"]} if "teacher_nll" in probes else None
    raw = {name: term["raw"] for name, term in line["terms"].items() if term["count"]}
    add(folder, preflight=found | {"initial": {"loss": line["loss"], "terms": raw, "probes": probes}, "teacher": teacher})


def add(folder: Path, **more) -> None:
    """Keys of a manifest that stands."""
    path = folder / "manifest.json"
    write_json(path, json.loads(path.read_text()) | more)


def describe(built, ready) -> dict:
    params = ready.abstract.params
    shapes = [
        {"name": optim.path_name(path), "shape": list(leaf.shape), "dtype": str(leaf.dtype), "group": group.name}
        for (path, leaf), group in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(ready.groups), strict=True)
    ]
    return {
        "command": sys.argv, "python": platform.python_version(), "packages": versions(), "git": _revision(),
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), "processes": jax.process_count(),
                   "mesh": dict(ready.mesh.shape)},
        "facts": built.recipe.facts, "groups": optim.table(params, ready.groups), "parameters": shapes,
    }


def versions() -> dict:
    """Of the packages that a run is made with; None of one that is not installed."""
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
