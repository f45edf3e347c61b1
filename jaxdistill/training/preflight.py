"""--dry_run: everything built and checked, the plan printed, no step run."""

import tempfile
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxdistill.recipe import Schedule
from jaxdistill.training import loop, optim, plan, sharding
from jaxdistill.training.prepare import compile_step, prepare


def dry_run(config: Any) -> None:
    """Prints, for each run: what it is, its first batch, parameter groups, loss terms with their schedules, predicted
    peak memory and FLOPs of a step. Raises what a real run would raise before its first step."""
    console = Console(highlight=False, soft_wrap=True)
    mesh = sharding.make_mesh(plan.as_dict(config)["mesh"])
    with tempfile.TemporaryDirectory() as scratch:
        for built in loop.check(config, Path(scratch)):
            ready = prepare(built, mesh, dry=True)
            train, recipe = built.train, built.recipe
            console.rule(f"{built.run.name}: recipe {built.run.spec['recipe']}, {train.steps} updates of {train.batch}", align="left")
            console.print(f"{recipe.facts.get('parameters', 0):,} parameters, mesh {dict(mesh.shape)}, seed {built.run.seed}")
            host = next(recipe.data("train", built.run.seed))
            if recipe.describe:
                console.print(recipe.describe(host), markup=False)
            console.print(_groups(ready), _terms(recipe, train.steps))
            batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=ready.batch_place) for name, x in _whole(host).items()}
            compiled, gates = compile_step(ready, batch)
            _say_reach(console, gates)
            _say_cost(console, compiled)
    console.print("dry run: everything builds; nothing was trained")


def _whole(host: dict) -> dict:
    """The shapes of the global batch, from those of this process's slice."""
    grow = lambda x: jax.ShapeDtypeStruct((x.shape[0] * jax.process_count(), *x.shape[1:]), x.dtype)  # noqa: E731
    return {name: grow(value) for name, value in host.items()}


def _groups(ready) -> Table:
    table = Table("group", "lr_mult", "weight decay", "frozen", "arrays", "parameters", title="parameter groups", title_justify="left")
    for row in optim.table(ready.abstract.params, ready.groups):
        table.add_row(row["group"], f"{row['lr_mult']:g}", f"{row['weight_decay']:g}", str(row["frozen"]),
                      str(row["leaves"]), f"{row['parameters']:,}")
    return table


def _terms(recipe, steps: int) -> Table:
    shares = (0, 0.1, 0.25, 0.5, 0.75, 1)
    table = Table("schedule", *(f"{share:.0%}" for share in shares), title="loss terms (weights) and knobs, by share of the updates", title_justify="left")

    def row(name: str, schedule: Schedule) -> None:
        table.add_row(name + (" (off)" if schedule.off else ""), *(f"{float(schedule(share * steps)):.3g}" for share in shares))

    for name, schedule in recipe.weights.items():
        row(name, schedule)
    for name, schedule in recipe.knobs.items():
        row(name, schedule)
    return table


def _say_reach(console: Console, gates) -> None:
    untouched = [leaf for leaf, terms in zip(gates.leaves, gates.reach, strict=True) if not terms]
    if untouched:
        console.print(f"no loss term reaches {len(untouched)} trainable parameter(s): {', '.join(untouched[:5])}", markup=False)


def _say_cost(console: Console, compiled) -> None:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    if memory is not None:
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        console.print(f"predicted peak memory a device: {peak / 2**20:,.0f} MiB ({memory.temp_size_in_bytes / 2**20:,.0f} MiB of it while a step runs)")
    cost = cost[0] if isinstance(cost, list) else cost or {}
    if "flops" in cost:
        console.print(f"a step on a device: {cost['flops'] / 1e9:,.2f} GFLOP")
