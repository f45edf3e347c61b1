"""The recipe: the one contract between what is learned and how it is run.

A recipe file exposes `make(config) -> Recipe`. It fits nothing and reads no device; `training` runs
whatever it returns and knows no task. The two wings meet here and nowhere else.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from jaxdistill import UserError

_LOADED: dict[str, tuple] = {}  # a recipe's module -> (its `make`, the source of it when this was first seen)
STAND_IN = "stand_in"  # a file in the folders of untrained models that stand, in checks, for what earlier runs will train


class Term(NamedTuple):
    """One line of the ledger; a micro-batch returns its part of it.

    `sum` is the masked, unweighted sum over examples or tokens. `count` is its divisor and comes from the
    batch and the key alone, never from parameters: the step surveys the counts before it trains.
    `factor` is a learned, differentiable multiplier (an uncertainty weight)."""

    sum: Array
    count: Array
    factor: Array | float = 1.0


class Aux(NamedTuple):
    """What a loss returns beside its total: the ledger's lines, the arrays (leading example axis) that
    `whole` needs of every example, and `(sum, count)` pairs that are only looked at."""

    terms: dict
    stats: dict = {}
    probes: dict = {}


class Dials(NamedTuple):
    """What the step turns, all traced. `scale` is weight / count of the WHOLE batch: multiply each
    sum by it and never divide again (of a term of `whole`, the weight: 0 while it is closed). `knobs` are temperatures,
    top-k and the like. `probing`: whether this update is one of those that are looked at, for `probed`; False: none ever is."""

    scale: dict
    knobs: dict
    probing: Any = False


class Variables(NamedTuple):
    """`params` is all that trains, one pytree. `extra` is carried and checkpointed, and written only by
    `calibrate` and `whole` (scalers, projections, running statistics)."""

    params: dict
    extra: dict = {}


@dataclasses.dataclass(frozen=True)  # not a NamedTuple: that is a pytree, and would be flattened
class Group:
    """A parameter group: its learning rate is `lr_mult` times the run's, its decay is decoupled."""

    name: str
    lr_mult: float = 1.0
    weight_decay: float = 0.0
    frozen: bool = False


class Evaluator(NamedTuple):
    """`measure(student, variables, frozen, batch) -> dict of arrays` is jitted; `student` is the deployed
    student (EMA or parameters). `finish(dict of stacked arrays) -> {name: float}` runs on the host. whole: it needs the whole split,
    as a ranking does, and must not be shown a part of it."""

    split: str
    measure: Callable
    finish: Callable
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A piecewise curve over update attempts: constant before the first knot and after the last.

    knots: ((step, value), ...), steps increasing. cosine: the segments (by index) that follow half a
    cosine instead of a line. Pure in the step, so that nothing recompiles when the value moves.
    """

    knots: tuple[tuple[float, float], ...]
    cosine: tuple[int, ...] = ()

    @classmethod
    def ramp(cls, points, steps: int, key: str = "schedule", *, least: float = -math.inf, most: float = math.inf) -> "Schedule":
        """((fraction of the run, value), ...) -> Schedule over `steps` updates. `key` names the config
        key in errors. ((0.0, 0.9),) is the constant 0.9. least, most: of its values."""
        wanted = "((fraction, value), ...) with fractions rising within 0 to 1, as in ((0.0, 0.1), (0.2, 0.7))"
        try:
            knots = tuple((float(fraction), float(value)) for fraction, value in points)
        except (TypeError, ValueError):
            knots = ()
        fractions = [fraction for fraction, _ in knots]
        finite = all(math.isfinite(number) for knot in knots for number in knot)
        if not knots or not finite or fractions != sorted(set(fractions)) or fractions[0] < 0 or fractions[-1] > 1:
            raise UserError(f"{key}: found {points!r}; accepted: {wanted}")
        if not all(least <= value <= most for _, value in knots):
            raise UserError(f"{key}: found {points!r}; accepted: values from {least:g}" + (f" to {most:g}" if most < math.inf else ""))
        return cls(tuple((fraction * max(steps, 1), value) for fraction, value in knots))

    def times(self, factor: float) -> "Schedule":
        """The curve, `factor` times as high."""
        return Schedule(tuple((step, factor * value) for step, value in self.knots), self.cosine)

    @property
    def values(self) -> tuple[float, ...]:
        """Of the knots; the curve is never outside their range."""
        return tuple(value for _, value in self.knots)

    @property
    def constant(self) -> float | None:
        """The value where the curve never moves, else None."""
        return self.values[0] if len(set(self.values)) == 1 else None

    @property
    def off(self) -> bool:
        """A constant 0: the term is left out of the program, and listed with count 0."""
        return self.constant == 0.0

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        steps = jnp.asarray([at for at, _ in self.knots], jnp.float32)
        values = jnp.asarray([value for _, value in self.knots], jnp.float32)
        if len(self.knots) == 1:
            return values[0]
        step = jnp.asarray(step, jnp.float32)
        segment = jnp.clip(jnp.searchsorted(steps, step, side="right") - 1, 0, len(self.knots) - 2)
        left, right = steps[segment], steps[segment + 1]
        along = jnp.clip((step - left) / (right - left), 0.0, 1.0)
        curved = jnp.asarray([index in self.cosine for index in range(len(self.knots) - 1)])[segment]
        along = jnp.where(curved, 0.5 - 0.5 * jnp.cos(jnp.pi * along), along)
        return values[segment] * (1 - along) + values[segment + 1] * along


@dataclasses.dataclass(frozen=True)
class Rest:
    """A weight: what the weight of the term `of` leaves of 1 at this step, controls included. While `of` is closed, all of it."""

    of: str
    off = False  # as a Schedule's; never by itself


class Outputs(NamedTuple):
    """What a recipe's teacher says of the rows of its splits: what `jaxdistill.cache` stores (data.teacher_cache).

    made: JSON, what it is made from: what a reader must agree with. rows: split -> their number. take: (split, index int [B], view)
    -> the batch on the host that holds these rows, in this view of them; rows past the end are padding. views: split -> how many
    there are. measure: split -> (frozen, batch) -> {field: [B, draws, ...]}, traced. constants: (frozen) -> {name: array}: what all
    rows share. units: ("token" or "image", split -> how many). dense: bytes of a teacher's logits for one of them, in bfloat16.
    save: (folder) -> small files that a reader needs beside them."""

    made: dict
    rows: dict
    take: Callable
    views: dict
    measure: dict
    constants: Callable
    units: tuple
    dense: int
    save: Callable = lambda folder: None


def while_on(schedule: Schedule, scale: Array | float, compute: Callable) -> Any:
    """compute(), or zeros while `scale` is 0: a term whose ramp has not begun costs nothing. Its count must not depend on it."""
    if schedule.constant is not None:
        return compute()
    empty = jax.eval_shape(compute)
    return jax.lax.cond(scale > 0, compute, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty))


def probed(probing: Any, measure: Callable, *seen) -> dict:
    """measure(*seen) -> probes, in the updates that are looked at; zeros, which cost nothing, in the others; {} where `probing` is
    False itself. Pass every traced array that `measure` needs in `seen`: it is cut off from the gradient."""
    if probing is False:
        return {}
    seen = jax.lax.stop_gradient(seen)
    empty = jax.eval_shape(measure, *seen)
    return jax.lax.cond(probing, measure, lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty), *seen)


def no_whole(params, extra, stats, knobs):
    """The default `whole`: no term over the whole batch, and nothing to write."""
    return {}, extra


def no_frozen(place):
    """The default `frozen`: no teacher, no constants."""
    return {}


class Sampler(NamedTuple):
    """Batches that the student itself writes, in a program of their own, before the step sees them.

    fraction: (step) -> the share of the updates whose batch is so written. Which they are follows from the run's key and their number
    alone.
    draw: (params, extra, frozen, batch, key) -> (a batch of the same shapes in its place, (sum, count) pairs that are only looked at);
    of the whole batch, with the parameters as they are before the update."""

    fraction: Callable
    draw: Callable


class Recipe(NamedTuple):
    """Everything `training` needs of a system.

    init: (key) -> Variables.
    loss: (params, extra, frozen, batch, dials, key) -> (total, Aux). Sums over examples ONLY.
    weights: term -> Schedule, or Rest; exactly the terms of `loss` and `whole`, else an error at trace.
    optim_rules: ((regex, Group), ...); each parameter path matches exactly one, by re.search.
    sharding_rules: ((regex, PartitionSpec), ...); the first match, by default replicated. One rule serves a
        parameter, its moments and its EMA, so no leading ^.
    data: (split, seed) -> grain iterator over dicts of arrays (pairings and samplers live there).
    evaluators: name -> Evaluator.
    whole: (params, extra, stats, knobs) -> (terms, extra), once an update over the full batch: whatever is not a
        sum over examples, and the only writer of `extra`.
    frozen: (place) -> teachers and constants, an argument of the step; never differentiated or checkpointed. place: path of a
        leaf -> its sharding, for what can be loaded straight into it; whatever comes elsewhere is moved.
    calibrate: (variables, frozen, batches) -> variables, on the host, in fresh runs only; batches as the step gets them.
    sampler: for the updates whose batch the student writes (on-policy distillation); None: every batch is as the data give it.
    knobs: name -> Schedule. controls: name -> multiplier that only `react` moves ("lr", or a term's name).
    memory: react's first memory (JSON). react: (memory, step, metrics) -> (memory, controls, stop reason | None), after
        an evaluation: its metrics, and `train/TERM`, the raw value of each loss term at this update.
    export: (params, folder) -> None, so that commands need no model.
    figures: (the deployed student's variables, frozen, batches of the test split as the step gets them) -> {name: matplotlib figure},
        drawn when a run is finished and shown in the report. What it computes of them comes to the host by `on_host`.
    describe: (batch) -> text for people: what a batch holds.
    preflight: (variables before the first update, a batch of the training split on the host) -> JSON of what only the recipe knows of
        its data and inputs, for the manifest and --dry_run (training.preflight.KEYS); cheap, as every run begins with it.
    outputs: (data.teacher_cache.Options) -> Outputs of its teacher, to be stored; None without a teacher that runs.
    facts: JSON facts of what the recipe was built from (fingerprints, hashes, sizes): part of the run's identity.
    """

    init: Callable
    loss: Callable
    weights: dict
    optim_rules: tuple
    data: Callable
    sharding_rules: tuple = ()
    evaluators: dict = {}
    whole: Callable = no_whole
    frozen: Callable = no_frozen
    calibrate: Callable | None = None
    sampler: Sampler | None = None
    knobs: dict = {}
    controls: dict = {}
    memory: dict = {}
    react: Callable | None = None
    export: Callable | None = None
    figures: Callable | None = None
    describe: Callable | None = None
    preflight: Callable | None = None
    outputs: Callable | None = None
    facts: dict = {}


def on_host(tree: Any) -> Any:
    """Whole arrays as numpy. Of several processes each holds its part of an array: all of them must ask, and all get it whole."""

    def whole(leaf):
        apart = isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
        return multihost_utils.process_allgather(leaf, tiled=True) if apart else jax.device_get(leaf)

    return jax.tree.map(whole, tree)


def load(name: str) -> Callable[[Any], Recipe]:
    """`name` -> that recipe's `make`. A bare name is a file of jaxdistill.recipes; a dotted path is any
    importable module of yours that has `make(config) -> Recipe`."""
    module = _module(name)
    if _LOADED.get(module.__name__, (None,))[0] is not module.make:  # a first look, or a module that was reloaded
        _LOADED[module.__name__] = module.make, _source(module)
    return module.make


def code(name: str) -> str | None:
    """SHA-256 of the source that a recipe from outside the package was loaded from; None where there is no source, and of the package's
    own recipes, which its version tells apart."""
    load(name)
    return _LOADED[_module(name).__name__][1]


def unedited(name: str) -> None:
    """Raises UserError: the recipe's source is no longer what was loaded, and runs."""
    if code(name) != _source(_module(name)):
        raise UserError(f"recipe: found {name!r} edited since it was imported; accepted: a restart of Python, so that what is written runs")


def _source(module) -> str | None:
    if module.__name__.split(".")[0] == __package__:
        return None
    # A module made in a notebook has no file, but its functions know their cells.
    for read in (lambda: Path(inspect.getsourcefile(module)).read_bytes(), lambda: inspect.getsource(module.make).encode()):
        with contextlib.suppress(OSError, TypeError):
            return hashlib.sha256(read()).hexdigest()
    return None


def _module(name: str):
    path = name if "." in name else f"jaxdistill.recipes.{name}"
    refused = UserError(
        f"recipe: found {name!r}, which has no `make`; accepted: a file of jaxdistill/recipes "
        "(lm, student_aware, dcal, reservoir, soft_label, floors) or the dotted path of a module with make(config) -> Recipe"
    )
    if not all(part.isidentifier() for part in path.split(".")):
        raise refused
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise  # what is missing inside the recipe is the recipe's own fault
        raise refused from None
    if not hasattr(module, "make"):
        raise refused
    return module
