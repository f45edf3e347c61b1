"""--dry_run: everything built and checked, the plan printed, and the loss before the first update; nothing is kept of it."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxdistill.recipe import Variables, on_host
from jaxdistill.training import loop, manifest, objective, optim, plan, sharding
from jaxdistill.training.metrics import record
from jaxdistill.training.prepare import compile_step, prepare


def dry_run(config: Any, *, quiet: bool = False) -> None:
    """Prints, for each run: what it is, its first batch, parameter groups, loss terms with their schedules, predicted
    peak memory and FLOPs of a step, what the data and the initial loss look like. Raises what a real run would raise before its
    first step. quiet: prints nothing (one of several processes does)."""
    console = Console(highlight=False, soft_wrap=True, quiet=quiet)
    runs = plan.expand(config)
    mesh = sharding.make_mesh(plan.as_dict(config)["mesh"])
    console.print(f"the job: {', '.join(one.id for one in runs)}")
    console.print("mesh: " + ", ".join(f"{name} {size}" for name, size in mesh.shape.items()) + f" ({mesh.devices.flat[0].device_kind})")
    shown: dict[str, str] = {}  # what was printed -> the run it was printed for
    with tempfile.TemporaryDirectory() as scratch:
        for built in loop.check(config, Path(scratch)):
            ready, recipe, name = prepare(built, mesh, dry=True), built.recipe, built.run.name
            console.print()
            console.rule(f"{name}: {_what(built)}", align="left")
            console.print(f"recipe {built.run.spec['recipe']}, {recipe.facts.get('parameters', 0):,} parameters")
            same = shown.setdefault(plan.digest([built.run.spec["recipe"], built.run.values]), name)
            if not built.train.steps or same != name:
                console.print(f"the program is that of {same}" if built.train.steps else "not trained: only measured")
                continue
            with contextlib.closing(recipe.data("train", built.run.seed)) as data:
                host = next(data)
            if recipe.describe:
                text = recipe.describe(host)
                same = shown.setdefault(text, name)
                console.print(f"first batch: that of {same}" if same != name else f"first batch, decoded:\n{text}", markup=False)
            console.print(_groups(ready), _terms(recipe, built.train.steps))
            batch = {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=ready.batch_place) for key, x in _whole(host).items()}
            compiled, gates = compile_step(ready, batch)
            _say_reach(console, gates)
            _say_cost(console, compiled, built.train.micro)
            _say_start(console, built, mesh, compiled, gates, host)
    console.print("\ndry run: everything builds; nothing was trained")


def _what(built) -> str:
    spec, train = built.run.spec, built.train
    if not train.steps:
        return "0 updates"
    if spec["seconds_of"]:
        return f"as many updates of {train.batch} as take the seconds of {spec['seconds_of']}"
    return f"{train.steps} updates of {train.batch}" + (f" in {train.micro} micro-batches" if train.micro > 1 else "")


def _whole(host: dict) -> dict:
    """The shapes of the global batch, from those of this process's slice."""
    grow = lambda x: jax.ShapeDtypeStruct((x.shape[0] * jax.process_count(), *x.shape[1:]), x.dtype)  # noqa: E731
    return {name: grow(value) for name, value in host.items()}


def _groups(ready) -> Table:
    table = Table("group", "lr_mult", "weight decay", "frozen", "arrays", "parameters",
                  title="parameter groups (lr_mult: times train.lr)", title_justify="left")
    for row in optim.table(ready.abstract.params, ready.groups):
        table.add_row(row["group"], f"{row['lr_mult']:g}", f"{row['weight_decay']:g}", str(row["frozen"]),
                      str(row["leaves"]), f"{row['parameters']:,}")
    return table


def _terms(recipe, steps: int) -> Table:
    shares = (0, 0.1, 0.25, 0.5, 0.75, 1)
    table = Table("schedule", *(f"{share:.0%}" for share in shares),
                  title="weights of the loss terms, and knobs, after a share of the updates", title_justify="left")

    weights = [objective.weights_at(recipe.weights, {}, share * steps) for share in shares]
    for name, curve in recipe.weights.items():
        table.add_row(name + (" (off)" if curve.off else ""), *(f"{float(now.get(name, 0.0)):.3g}" for now in weights))
    sampled = {} if recipe.sampler is None else {"share of sampled batches": recipe.sampler.fraction}
    for name, curve in (recipe.knobs | sampled).items():
        table.add_row(name, *(f"{float(curve(share * steps)):.3g}" for share in shares))
    return table


def _say_reach(console: Console, gates) -> None:
    untouched = [leaf for leaf, terms in zip(gates.leaves, gates.reach, strict=True) if not terms]
    if untouched:
        console.print(f"no loss term reaches {len(untouched)} trainable parameter(s): {', '.join(untouched[:5])}", markup=False)


def _say_start(console: Console, built, mesh, compiled, gates, host: dict) -> None:
    """Splits and inputs, and the loss of the initial parameters: that of one update, which is then thrown away."""
    memory, most = compiled.memory_analysis(), _available()
    beyond = memory is not None and most and memory.argument_size_in_bytes + memory.temp_size_in_bytes > most
    if sharding.agree(int(bool(beyond))):
        console.print("the initial loss is not measured: a step does not fit into the memory of this machine")
        return
    ready = prepare(built, mesh)
    state = ready.state if built.recipe.calibrate is None else loop.calibrated(ready, ready.state)
    found = manifest.preflight(ready, gates, Variables(state.params, on_host(state.extra)), host)
    if found["splits"]:
        console.print("rows: " + ", ".join(f"{name} {rows:,}" for name, rows in found["splits"].items()))
    for line in found["leaks"] or ():
        console.print(f"warning: {line}", markup=False)
    if found["unseen_classes"]:
        first = ", ".join(map(str, found["unseen_classes"][:8]))
        console.print(f"warning: {len(found['unseen_classes'])} classes never train: {first}", markup=False)
    if found["input"]:
        console.print("inputs as the model sees them: " + ", ".join(f"{name} {value:.3g}" for name, value in found["input"].items()))
    if found["reachable"]:
        console.print("bounds: " + ", ".join(f"{name} {value:.3g}" for name, value in found["reachable"].items()))
    line = record(1, jax.device_get(compiled(state, ready.frozen, ready.place(host))[1]))
    raw = ", ".join(f"{name} {term['raw']:.4g}" for name, term in line["terms"].items() if term["count"])
    known = f"; knowing nothing costs {found['uniform_nll']:.4g}, the log of {found['classes']:,}" if found["uniform_nll"] else ""
    untrained = " (with stand-ins for what earlier runs train)" if built.run.filled else ""
    console.print(f"initial loss {line['loss']:.4g}: {raw}{known}{untrained}", markup=False)


def _available() -> int | None:
    """Bytes that a device here has, or the machine has left; None where nobody tells."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in names else None


def _say_cost(console: Console, compiled, micro: int) -> None:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    if memory is not None:
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        console.print(f"predicted peak memory of a device: {peak / 2**20:,.0f} MiB, "
                      f"{memory.temp_size_in_bytes / 2**20:,.0f} MiB of it only while a step runs")
    cost = cost[0] if isinstance(cost, list) else cost or {}
    if "flops" in cost:  # XLA counts the body of a loop once, however often it runs; the update beside it hardly counts
        console.print(f"predicted FLOPs of a step on a device: {micro * cost['flops'] / 1e9:,.3g} GFLOP")
