"""One run made ready: mesh -> recipe -> variables -> groups -> state in its shardings -> compiled step."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import UserError
from jaxdistill.diagnosis.gates import STOPS, Gates
from jaxdistill.diagnosis.reach import reach
from jaxdistill.recipe import Recipe, Variables, load, on_host
from jaxdistill.training import objective, optim, sharding, state
from jaxdistill.training.plan import Run, Watched


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The section `train`."""

    steps: int
    batch: int
    micro: int
    lr: float
    warmup: float
    final_lr: float
    ema: float
    eval_every: int
    checkpoint_every: int
    log_every: int

    def __post_init__(self):
        for key in ("batch", "micro", "eval_every", "checkpoint_every", "log_every"):
            if getattr(self, key) < 1:
                raise UserError(f"config key train.{key}: found {getattr(self, key)}; accepted: 1 or more")
        if self.steps < 0:
            raise UserError(f"config key train.steps: found {self.steps}; accepted: 0 or more")
        if not 0 <= self.lr < math.inf:
            raise UserError(f"config key train.lr: found {self.lr}; accepted: 0 or more")
        for key in ("warmup", "final_lr", "ema"):
            value = getattr(self, key)
            if not 0 <= value <= 1 or (value == 1 and key != "final_lr"):
                raise UserError(f"config key train.{key}: found {getattr(self, key)}; accepted: a share from 0 to 1")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The section `optimizer`."""

    name: str
    b1: float
    b2: float
    eps: float
    momentum: float
    weight_decay: float  # read by the recipes, whose groups carry it
    decay: str
    clip: float
    clip_value: float = 0.0

    def __post_init__(self):
        for key in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"config key optimizer.{key}: found {getattr(self, key)}; accepted: 0 or more, and below 1")
        for key in ("eps", "weight_decay", "clip", "clip_value"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"config key optimizer.{key}: found {getattr(self, key)}; accepted: 0 or more")
        if self.name == "adamw" and self.eps < np.finfo(np.float32).tiny:  # a moment of 0 is divided by it
            raise UserError(f"config key optimizer.eps: found {self.eps}; accepted with adamw: above 0, in float32")


@dataclasses.dataclass(frozen=True)
class ProbesConfig:
    """The section `probes`."""

    every: int
    deep: int

    def __post_init__(self):
        for key in ("every", "deep"):
            if getattr(self, key) < 0:
                raise UserError(f"config key probes.{key}: found {getattr(self, key)}; accepted: 0 (never) or more")


@dataclasses.dataclass(frozen=True)
class GatesConfig:
    """The section `gates`."""

    non_finite: int
    zero_gradient: int
    idle: int
    ledger_gap: float
    stop: tuple

    def __post_init__(self):
        for key, least in (("non_finite", 1), ("zero_gradient", 0), ("idle", 0), ("ledger_gap", 0)):
            if not getattr(self, key) >= least:
                raise UserError(f"config key gates.{key}: found {getattr(self, key)}; accepted: {least} or more")
        if unknown := [name for name in self.stop if name not in STOPS]:
            raise UserError(f"config key gates.stop: found {unknown[0]!r}; accepted: some of {', '.join(STOPS)}, or () for none")


@dataclasses.dataclass
class Built:
    """A run's recipe and the sections of its config that the loop itself reads. Nothing on a device yet."""

    run: Run
    recipe: Recipe
    train: TrainConfig
    optimizer: OptimizerConfig
    probes: ProbesConfig
    gates: GatesConfig
    monitor: str
    minimize: bool
    tensorboard: bool


def build(run: Run) -> Built:
    """Reads every key that the run will ever read, so that a key that nothing reads shows before any work."""
    try:
        built = _build(run, run.config)
    except UserError as error:  # in the user's words: `model.width` is written as `run.teacher.model.width`
        raise UserError(re.sub(r"(?<=^config key )[\w.]+(?=:)", lambda key: run.origin.get(key[0], key[0]), str(error))) from None
    measured = [name for name, evaluator in built.recipe.evaluators.items() if evaluator.split != "test"]
    if built.train.steps and measured and built.monitor.split("/")[0] not in measured:
        raise UserError(f"config key monitor: found {built.monitor!r}; accepted: {', '.join(f'{name}/METRIC' for name in measured)}")
    return built


def _build(run: Run, config: Watched) -> Built:
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UserError("config key tensorboard: found True without tensorboardX; accepted: False, or pip install jaxdistill[tensorboard]")
    train = config.train.build(TrainConfig)
    return Built(
        run=run, train=train, optimizer=config.optimizer.build(OptimizerConfig), probes=config.probes.build(ProbesConfig),
        gates=config.gates.build(GatesConfig),
        monitor=config.monitor, minimize=config.minimize, tensorboard=config.tensorboard,
        recipe=load(run.spec["recipe"])(config),
    )


@dataclasses.dataclass
class Prepared:
    """A run ready to step. `state` is the fresh one (None once it is in use); `abstract` is its shapes with shardings."""

    built: Built
    mesh: Any
    state: state.TrainState | None
    abstract: state.TrainState
    frozen: dict
    groups: Any
    step: Any
    batch_place: Any
    gates: Gates

    def place(self, batch: dict) -> dict:
        return sharding.global_batch(batch, self.batch_place)


def fixed(recipe: Recipe, mesh) -> dict:
    """The recipe's teachers and constants, in their shardings."""
    frozen = recipe.frozen(lambda name: sharding.NamedSharding(mesh, sharding.rule(recipe.sharding_rules, name)))
    return sharding.put(frozen, sharding.shardings(frozen, recipe.sharding_rules, mesh))


def prepare(built: Built, mesh, *, dry: bool = False) -> Prepared:
    """dry: shapes only, nothing is allocated (state is None and frozen holds shapes)."""
    recipe, train = built.recipe, built.train
    sharding.check_batch(train.batch, train.micro, mesh)
    root = jax.random.key(built.run.seed)
    place = lambda tree: sharding.shardings(tree, recipe.sharding_rules, mesh)  # noqa: E731
    shapes = jax.eval_shape(recipe.init, root)
    groups = optim.group_tree(shapes.params, recipe.optim_rules)
    tx = optim.optimizer(built.optimizer, groups)
    begin = lambda variables, key: state.fresh(variables, groups, tx, recipe.controls, key, ema=train.ema > 0)  # noqa: E731
    places = place(jax.eval_shape(begin, shapes, root))
    if dry:
        fresh, frozen = None, jax.eval_shape(lambda: recipe.frozen(None))
        frozen = _shaped(frozen, place(frozen))
        abstract = _shaped(jax.eval_shape(begin, shapes, root), places)
    else:
        variables = recipe.init(jax.random.fold_in(root, 0))
        variables = sharding.put(variables, place(variables))
        fresh = jax.jit(begin, donate_argnums=0, out_shardings=places)(variables, jax.random.fold_in(root, 1))
        frozen = fixed(recipe, mesh)
        abstract = _shaped(fresh, places)

    lr = objective.learning_rate(train.lr, train.warmup, train.final_lr, train.steps)
    step = state.make_train_step(
        recipe, groups, tx, lr, micro=train.micro, ema=train.ema, gather=sharding.gathering(recipe.sharding_rules, mesh),
        left=functools.partial(optim.left_by_clip, built.optimizer), every=built.probes.every,
    )
    step = jax.jit(step, donate_argnums=0, out_shardings=(places, sharding.replicate(mesh)))
    names = tuple(optim.path_name(path) for path, _ in jax.tree.leaves_with_path(optim.cut(shapes.params, groups)))
    gates = Gates(names, (), built.gates.zero_gradient, built.gates.non_finite, built.gates.ledger_gap, built.gates.idle, built.gates.stop)
    return Prepared(built, mesh, fresh, abstract, frozen, groups, step, sharding.batch_sharding(mesh), gates)


def _shaped(tree, places):
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def compile_step(ready: Prepared, batch: dict):
    """(the compiled step, the gates that know which term reaches which parameter). `batch`: one global batch."""
    recipe = ready.built.recipe
    gradients = state.make_gradients(recipe, ready.groups, ready.built.train.micro)  # (no sharding: who reaches whom is the same)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    weights = {name: scalar for name, schedule in recipe.weights.items() if not schedule.off}
    knobs = dict.fromkeys(recipe.knobs, scalar)
    s = ready.abstract
    reached = reach(
        lambda weights, *rest: gradients(*rest[:4], weights, *rest[4:])[0],
        weights, s.params, s.extra, ready.frozen, batch, knobs, s.rng,
    )
    return ready.step.lower(s, ready.frozen, batch).compile(), ready.gates._replace(reach=tuple(reached))


def evaluate(ready: Prepared, params, extra, *, test: bool, cache: dict, most: int | None = None) -> dict[str, float]:
    """Every evaluator of the test split (test=True), or of all other splits: {'evaluator/metric': value}.

    params: the deployed student's. cache: jitted measures, kept between calls. most: batches at most, to see what comes.
    Sees no loss weight and no step."""
    found = {}
    for name, evaluator in ready.built.recipe.evaluators.items():
        if (evaluator.split == "test") != test:
            continue
        if evaluator.measure not in cache:
            cache[evaluator.measure] = jax.jit(
                state.make_eval_step(evaluator, sharding.gathering(ready.built.recipe.sharding_rules, ready.mesh)),
                out_shardings=sharding.replicate(ready.mesh),
            )
        with contextlib.closing(ready.built.recipe.data(evaluator.split, 0)) as data:
            rows = [
                jax.device_get(cache[evaluator.measure](params, extra, ready.frozen, ready.place(batch)))
                for batch in itertools.islice(data, None if evaluator.whole else most)
            ]
        if not rows:
            raise UserError(f"evaluator {name}: found no batch in the split {evaluator.split!r}; "
                            "accepted: more data there, or a smaller train.batch")
        stacked = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        found |= {f"{name}/{key}": float(value) for key, value in evaluator.finish(stacked).items()}
    return found


def export(ready: Prepared, params, folder: Path) -> None:
    """The deployed student in `folder`, written by one process."""
    if ready.built.recipe.export is None:
        return
    host = on_host(params)
    if jax.process_index() == 0:
        ready.built.recipe.export(host, folder)


def draw(ready: Prepared, params, extra, folder: Path) -> None:
    """The recipe's figures of the deployed student on the test split, as `folder`/NAME.png, written by one process."""
    if ready.built.recipe.figures is None:
        return
    with contextlib.closing(ready.built.recipe.data("test", 0)) as data:
        figures = ready.built.recipe.figures(Variables(params, extra), ready.frozen, map(ready.place, data))
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=110)
