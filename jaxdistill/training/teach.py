"""A job's teacher, run once over the rows that its students train and are measured on, into a teacher cache."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill import UserError
from jaxdistill.data import shards, teacher_cache
from jaxdistill.data.teacher_cache import Options, Table
from jaxdistill.recipe import Outputs
from jaxdistill.training import loop, manifest, plan, sharding, store
from jaxdistill.training.prepare import Built, build, fixed
from jaxdistill.training.signals import Signals


def run(config: Any, workdir: str | Path, options: Options, *, dry_run: bool = False, say=print) -> None:
    """Fills `workdir` with the cache of the config's teacher, which is trained first where it has to be. dry_run: only the sizes
    are told. Raises UserError, loop.Interrupted or loop.Sick, each with one line to show."""
    if jax.process_count() > 1:
        raise UserError(f"processes: found {jax.process_count()}; accepted: 1 (a cache is written by one process, on all its devices)")
    workdir, mesh = Path(workdir).expanduser().absolute(), sharding.make_mesh(plan.as_dict(config)["mesh"])
    with tempfile.TemporaryDirectory() as scratch:
        found = loop.check(config, Path(scratch))
        built = _taught(config, found)
        sharding.check_batch(built.train.batch, 1, mesh)
        outputs = built.recipe.outputs(options)
        _for_all(config, found, options)
        layouts = _layouts(built, outputs)
        _tell(outputs, layouts, say)
        if dry_run:
            say("dry run: nothing was stored")
            return
    store.claim(workdir, config)
    with store.alone(workdir), Signals() as signals:
        store.keep(workdir, config)
        built = _with_teacher(config, built, [one.run for one in found], workdir)
        outputs = built.recipe.outputs(options)

        def go_on() -> None:
            if code := signals.code():
                raise loop.Interrupted(code, workdir)

        stream = _Stream(built, outputs, mesh, go_on)
        tables = {split: Table(layouts[split], outputs.rows[split], stream.rows(split)) for split in outputs.measure}
        if "constants" in layouts:
            tables["constants"] = Table(layouts["constants"], 1, lambda span: stream.constants())
        teacher_cache.write(
            workdir, outputs.made | {"batch": built.train.batch}, tables,
            machine={"packages": manifest.versions(), "device": jax.devices()[0].device_kind, "mesh": dict(mesh.shape)},
            step=built.train.batch, save=outputs.save, say=say,
        )
    say(f"{workdir}: whole. Train from it with the same config and --config.teacher.cache={workdir}")


def _taught(config: Any, found: list[Built]) -> Built:
    """The run whose teacher is stored: the headline, or the first that has one."""
    config = plan.as_dict(config)
    order = list(dict.fromkeys([config["headline"], *config["runs"]]))
    runs = [built for name in order for built in found if built.run.name == name]
    for built in runs:
        if path := built.run.get("teacher.cache"):
            raise UserError(f"config key teacher.cache: found {path!r}; accepted: '' (a cache is made from the teacher itself)")
        if built.recipe.outputs:
            return built
    raise UserError(f"config key runs: found {', '.join(config['runs'])}, none of which has a teacher whose outputs can be kept; accepted: "
                    "a job that distils, as configs/kd.py")


def _for_all(config: Any, found: list[Built], options: Options) -> None:
    """Refuses a job of which another run could not train from the cache."""
    seeds, asked = (plan.as_dict(config)[key] for key in ("seeds", "runs"))
    for built in found:
        if built.recipe.outputs and built.run.name in asked:
            built.recipe.outputs(options)
    apart = [built.run.name for built in found if built.run.spec["fills"] and not built.run.spec["once"]]
    if apart and len(seeds) > 1:
        raise UserError(f"config key run.{apart[0]}.once: found False with seeds {tuple(seeds)}; accepted: True, or one seed (a cache is "
                        "of one teacher)")


def _with_teacher(config: Any, built: Built, runs: list[plan.Run], workdir: Path) -> Built:
    """The run again, with what it takes from earlier runs in place of stand-ins: these are run in `workdir`."""
    origins = {origin.removeprefix("runs/") for origin in built.run.filled.values()}
    if not origins:
        return built
    names = [one.name for one in runs if one.spec["fills"]]  # in order; one that another takes from comes before it
    last = max(names.index(one.name) for one in runs if one.id in origins)
    job = plan.as_dict(config) | {"runs": tuple(names[: last + 1]), "seeds": tuple(config["seeds"])[:1], "headline": ""}
    loop.run(job, workdir, held=True)
    store.keep(workdir, config)  # the job as it was asked for, not the part of it that was run
    filled: dict = {}
    for one in plan.expand(job):
        loop.offer(one, workdir / "runs" / one.id / "export", filled)
    again = next(one for one in plan.expand(config, everything=True) if one.name == built.run.name)
    loop.fill(again, filled)
    return build(again)


def _layouts(built: Built, outputs: Outputs) -> dict[str, shards.Layout]:
    """Of each table: what `measure` gives for a row, and the constants."""
    frozen = jax.eval_shape(lambda: built.recipe.frozen(None))
    layouts = {}
    for split, measure in outputs.measure.items():
        found = jax.eval_shape(measure, frozen, outputs.take(split, np.arange(built.train.batch), 0))
        views = {name: jax.ShapeDtypeStruct((x.shape[0], x.shape[1] * outputs.views[split], *x.shape[2:]), x.dtype)
                 for name, x in found.items()}
        layouts[split] = shards.Layout.of(views)
    if constants := jax.eval_shape(outputs.constants, frozen):
        layouts["constants"] = shards.Layout.of({name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in constants.items()})
    return layouts


def _tell(outputs: Outputs, layouts: dict, say) -> None:
    """What it takes on disk, beside whole logits."""
    unit, counts = outputs.units
    for split, layout in layouts.items():
        rows = outputs.rows.get(split, 1)
        size = rows * layout.row
        each = f", {size / counts[split]:,.1f} bytes a {unit} (all logits in bfloat16: {outputs.dense:,})" if split in counts else ""
        fields = ", ".join(f"{name} {dtype} {'x'.join(map(str, shape))}" for name, dtype, shape in layout.fields)
        say(f"{split}: {rows:,} rows of {fields}; {size / 2**20:,.2f} MiB{each}")


class _Stream:
    """The teacher over the rows of a split, a batch at a time, as training would run it."""

    def __init__(self, built: Built, outputs: Outputs, mesh, go_on):
        self.outputs, self.batch, self.go_on = outputs, built.train.batch, go_on
        self.frozen, self.place = fixed(built.recipe, mesh), sharding.batch_sharding(mesh)
        gather = sharding.gathering(built.recipe.sharding_rules, mesh)
        programs = {measure: jax.jit(lambda frozen, batch, measure=measure: measure(gather(frozen), batch))
                    for measure in outputs.measure.values()}  # splits that share a measure share its program
        self.programs = {split: programs[measure] for split, measure in outputs.measure.items()}

    def constants(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(array)[None] for name, array in jax.device_get(self.outputs.constants(self.frozen)).items()}

    def rows(self, split: str):
        """Span of rows -> {field: [rows, views, ...]} on the host."""

        def make(span: range) -> dict[str, np.ndarray]:
            found, ahead = [], None
            for start in range(span.start, span.stop, self.batch):
                self.go_on()
                index, before = np.arange(start, start + self.batch), ahead
                ahead = [self._see(split, index, view) for view in range(self.outputs.views[split])]
                if before:  # fetched while the device works on the next
                    found.append(_joined(before))
            found.append(_joined(ahead))
            return {name: np.concatenate([part[name] for part in found])[: len(span)] for name in found[0]}

        return make

    def _see(self, split: str, index: np.ndarray, view: int) -> dict:
        batch = sharding.global_batch(self.outputs.take(split, index, view), self.place)
        return self.programs[split](self.frozen, batch)


def _joined(views: list[dict]) -> dict[str, np.ndarray]:
    """Views of the same rows, fetched: [B, views, ...] of each field."""
    views = jax.device_get(views)
    return {name: np.concatenate([view[name] for view in views], axis=1) for name in views[0]}
