"""run: an ordered list of runs, each finished, resumed or trained. train: one run.

The order inside a run is written down in `_steps`, where it happens.
"""

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill import UserError
from jaxdistill.diagnosis.finding import Finding
from jaxdistill.diagnosis.probes import fingerprint
from jaxdistill.recipe import STAND_IN, Variables, on_host, unedited
from jaxdistill.training import distributed, manifest, optim, plan, results, sharding, store
from jaxdistill.training.checkpoint import Checkpoints
from jaxdistill.training.deep import Deep
from jaxdistill.training.metrics import Lines, TensorBoard, Terminal, record, write_json
from jaxdistill.training.prepare import Built, Prepared, build, compile_step, draw, evaluate, export, prepare
from jaxdistill.training.sampling import Sampling
from jaxdistill.training.signals import Signals
from jaxdistill.training.state import deployed

SICK = "sick: "  # begins the stop reason that a gate leaves in the checkpoint


class Interrupted(Exception):
    """SIGTERM (code 75: unfinished, resumable) or SIGINT (130); everything done so far is saved."""

    def __init__(self, code: int, where: Path):
        super().__init__(f"interrupted; saved in {where}. The same command goes on from here")
        self.code = code


class Sick(Exception):
    """A gate stopped the run: going on would be waste. The message is the finding."""

    code = 1


def run(config: Any, workdir: str | Path, *, quiet: bool = False, held: bool = False) -> dict:
    """Runs a job: every run of `config.runs`, for every seed, in `workdir`; returns what results.json holds.

    Runs that are finished there are kept, one that was interrupted goes on, bit-exactly. A workdir of another
    config is refused with the keys in which it differs. config: a ConfigDict that started from
    jaxdistill.training.defaults. held: the caller is the workdir's only writer already (store.alone). Raises UserError, Interrupted or
    Sick, each with one line to show."""
    runs = plan.expand(config)
    workdir = store.claim(Path(workdir), config)
    with Signals() as signals, contextlib.ExitStack() as stack:
        mesh = sharding.make_mesh(plan.as_dict(config)["mesh"])
        with tempfile.TemporaryDirectory() as scratch:
            for built in check(config, Path(scratch)):
                prepare(built, mesh, dry=True)
        if not held:
            stack.enter_context(store.alone(workdir))
        store.keep(workdir, config)  # only now: a config that is refused must not stand in the way of its correction
        rows: list[dict] = []
        done: dict[str, dict] = {}
        filled: dict = {}
        for one in runs:
            folder = workdir / "runs" / one.id
            fill(one, filled)
            pace(one, done)
            built = build(one)
            want = plan.identity(one, built.recipe.facts)
            result = store.finished(folder, want)
            if result is None and one.spec["cached"]:
                result = store.from_cache(folder, want, config)
            if result is None:
                result = train(built, mesh, folder, want, signals, quiet=quiet)
                if one.spec["cached"]:
                    store.to_cache(folder, want, config)
            offer(one, folder / "export", filled)
            done[one.id] = result
            rows.append(result["row"] | {"name": one.name})  # (one from the cache may have had another)
            results.publish(workdir, rows, config)
            sharding.barrier(one.id)
        return results.publish(workdir, rows, config)


def check(config: Any, scratch: Path) -> list[Built]:
    """Builds every run that the config defines, before any of them trains; keys that nothing reads are an error.

    What a later run takes from an earlier one is stood in for by an untrained export in `scratch`."""
    runs = plan.expand(config, everything=True)
    built, filled = [], {}
    for one in runs:
        fill(one, filled)
        built.append(build(one))
        unedited(one.spec["recipe"])
        key, recipe = one.spec["fills"], built[-1].recipe
        if key and not recipe.export:
            raise UserError(f"config key run.{one.name}.fills: found {key!r}, but the recipe {one.spec['recipe']!r} exports nothing; "
                            "accepted: a recipe with `export`")
        if key and not one.get(key):
            recipe.export(jax.device_get(recipe.init(jax.random.key(0)).params), scratch / one.name)
            (scratch / one.name / STAND_IN).touch()
            offer(one, scratch / one.name, filled)
    plan.unread(config, runs)
    return built


def offer(one: plan.Run, folder: Path, filled: dict) -> None:
    """Has `folder` fill the key that the run fills: for later runs of the same seed, or of all seeds if it runs once."""
    if one.spec["fills"]:
        filled[one.spec["fills"], None if one.spec["once"] else one.seed] = str(folder), one.id


def fill(one: plan.Run, filled: dict) -> None:
    """Puts the folders exported by earlier runs into the keys that wait for them."""
    for (key, seed), (folder, origin) in filled.items():
        if seed in (None, one.seed) and one.get(key) == "":
            one.set(key, folder)
            one.filled[key] = f"runs/{origin}"


def pace(one: plan.Run, done: dict) -> None:
    """The updates of a run that trains for the same seconds as another: from two finished results, so that a
    resumed job counts the same."""
    spec = one.spec
    if not (spec["seconds_of"] or spec["pace_of"]):
        return
    for key in ("seconds_of", "pace_of"):
        if f"{spec[key]}-{one.seed}" not in done:
            raise UserError(f"config key run.{one.name}.{key}: found {spec[key]!r}; accepted: a run that comes earlier in runs")
    time_of, pace_of = (done[f"{spec[key]}-{one.seed}"]["row"] for key in ("seconds_of", "pace_of"))
    if pace_of["steps"]:
        one.set("train.steps", max(1, round(time_of["seconds"] * pace_of["steps"] / pace_of["seconds"])))


def train(built: Built, mesh, folder: Path, want: dict, signals: Signals, *, quiet: bool) -> dict:
    """One run in `folder`, from its last checkpoint if it has one; returns and writes its result."""
    writer = jax.process_index() == 0
    ready = prepare(built, mesh)
    steps = built.train.steps
    store.begin(folder, built, ready, want)
    checkpoints = Checkpoints(folder / "checkpoints", minimize=built.minimize)
    distributed.saves(built.run.id, checkpoints.folder)
    terminal = Terminal(built.run.id, steps, quiet=quiet or not writer)
    jitted: dict = {}
    data = None
    try:
        data = built.recipe.data("train", built.run.seed) if steps else None
        memory = {"gates": ready.gates.start(), "recipe": built.recipe.memory, "seconds": 0.0, "stop": "",
                  "validation": {}, "frozen": 0}
        state, ready.state = ready.state, None
        restored = checkpoints.restore(ready.abstract, data, terminal.say) if steps else None
        if restored is not None:
            state, memory = restored
            terminal.say(f"{built.run.id}: goes on from update {int(state.step)}")
        else:
            if steps and built.recipe.calibrate:
                state = calibrated(ready, state)
            memory["frozen"] = _frozen_print(ready, state)  # calibration may write what no update may
            found = evaluate(ready, deployed(state), state.extra, test=False, cache=jitted, most=1 if steps else None)
            if steps and found and built.monitor not in found:  # one batch, so that it shows before any update
                raise UserError(f"config key monitor: found {built.monitor!r}; accepted: {', '.join(found)}")
            memory["validation"] = {} if steps else found
            if steps and not found:  # without a validation split the test shows before any update whether it can be measured
                evaluate(ready, deployed(state), state.extra, test=True, cache=jitted, most=1)
        if memory["stop"].startswith(SICK):
            raise Sick(f"{built.run.id} stopped: {memory['stop'].removeprefix(SICK)}")
        if steps and not memory["stop"]:
            state = _steps(ready, state, data, memory, checkpoints, folder, terminal, signals, jitted)
        row = _row(ready, state, memory, checkpoints, jitted)
        export(ready, deployed(state), folder / "export")
        draw(ready, deployed(state), state.extra, folder / "figures")
    finally:
        terminal.close()
        checkpoints.close()
        if data is not None:
            data.close()  # its workers, where it has any, do not end by themselves
    result = {"row": row, "identity": want, "export": store.folder_digest(folder / "export")}
    if writer:
        write_json(folder / "result.json", result)
    return store.finished(folder, want)


def _steps(ready: Prepared, state, data, memory: dict, checkpoints, folder: Path, terminal, signals, jitted: dict):
    """The loop. For each update N:

    sample N's batch where the student writes it -> dispatch N -> fetch the metrics of N-1 -> gates on N-1 -> deep look when due ->
    evaluation when due -> react -> checkpoint when due -> next batch. Where any of these is due, N's own metrics are fetched first: what
    is looked at, judged and saved is the run as it is now. The deep look needs N's batch, and stands before the checkpoint so that its
    line is there when the update is saved."""
    config, built = ready.built.train, ready.built
    at = int(state.step)
    writer = jax.process_index() == 0
    batch = None
    if at < config.steps:
        host = next(data)
        batch = ready.place(host)
        with terminal.status("compiling"):
            step, gates = compile_step(ready, batch)
        inside, sampling = Deep(ready, gates), Sampling(ready, state)
        if at == 0:
            told = manifest.preflight(ready, gates, Variables(state.params, on_host(state.extra)), host)
            if writer:
                manifest.add(folder, preflight=told)
    lines = Lines(folder / "metrics.jsonl", step=at) if writer else None
    board = TensorBoard(folder / "tensorboard", at) if writer and built.tensorboard else None
    terminal.begin(at)
    pending, saved = None, at
    often = built.probes.deep
    since = time.monotonic()

    def take(pending) -> dict:
        """Metrics of one update, fetched: the ledger's line, then the gates. Returns the line."""
        number, metrics, drawn = pending
        metrics, drawn = jax.device_get((metrics, drawn))
        memory["gates"], findings = gates.check(memory["gates"], number, metrics)
        line = sampling.record(record(number, metrics), drawn)
        if writer and (number % config.log_every == 0 or findings or number in (1, config.steps)):
            lines.write(line | ({"findings": [f._asdict() for f in findings]} if findings else {}))
            if board:
                board.write(line)
        if writer and number == 1:
            manifest.begun(folder, line)
        tell(number, findings)
        terminal.update(line)
        return line

    def tell(number: int, findings: list) -> None:
        """What the gates found: said, kept in the progress line, and a reason to stop where it is an error."""
        for finding in findings:
            terminal.say(f"{built.run.id}: {finding.severity}: {finding}")
            terminal.warned = f"{finding.name} at {number}"
            if finding.severity == "error":
                memory["stop"] = memory["stop"] or f"{SICK}{finding}"

    try:
        while at < config.steps and not memory["stop"]:
            batch, drawn = sampling.replace(at, state, batch)  # before the step, to which the state is donated
            state, metrics = step(state, ready.frozen, batch)
            at += 1
            if pending:
                take(pending)
            pending = (at, metrics, drawn)
            last = at == config.steps
            code = signals.code()
            due = last or at % config.eval_every == 0
            save = due or code or memory["stop"] or at % config.checkpoint_every == 0
            if save or (often and at % often == 0):
                line = take(pending)  # waits until update N is done
                pending = None
                memory["seconds"] += time.monotonic() - since
                if often and at % often == 0 and line["finite"] and not memory["stop"]:
                    found = inside.look(state, batch)
                    if lines:
                        lines.write({"step": at, "deep": found})
                monitored = None
                if due and not memory["stop"] and (moved := _moved(ready, state, memory, gates, at)):
                    if lines:
                        lines.write({"step": at, "findings": [moved._asdict()]})
                    tell(at, [moved])
                if due and not memory["stop"]:
                    monitored, state = _evaluate(ready, state, memory, line, terminal, jitted, lines)
                if save or memory["stop"]:
                    checkpoints.save(at, state, data, memory, monitored)
                    saved = at
                if code:
                    checkpoints.wait()
                    raise Interrupted(code, folder.parent.parent)
                since = time.monotonic()
            if not last:
                batch = ready.place(next(data))
    finally:
        if lines:
            lines.close()
        if board:
            board.close()
    checkpoints.wait()
    assert saved == at, "the last update is always saved"
    if memory["stop"].startswith(SICK):
        raise Sick(f"{built.run.id} stopped: {memory['stop'].removeprefix(SICK)}")
    return state


def _evaluate(ready: Prepared, state, memory: dict, line: dict, terminal, jitted: dict, lines):
    """Validation, then `react`, which also sees the raw loss terms of this update's `line`. Returns the monitored value
    and the state with react's controls."""
    built, at = ready.built, line["step"]
    found = evaluate(ready, deployed(state), state.extra, test=False, cache=jitted)
    memory["validation"] = found
    if lines:
        lines.write({"step": at, "evaluation": found})
    if found:
        terminal.say(f"{built.run.id:<24} {at:>6}/{built.train.steps}  {built.monitor} {found[built.monitor]:.4f}")
    if built.recipe.react:
        raw = {f"train/{name}": term["raw"] for name, term in line["terms"].items()}
        memory["recipe"], controls, stop = built.recipe.react(memory["recipe"], at, found | raw)
        if unknown := controls.keys() - state.controls.keys():
            raise ValueError(f"react moves {sorted(unknown)}; the recipe's controls are {sorted(state.controls)}")
        state = state.replace(controls={
            name: sharding.place(np.asarray(controls[name], old.dtype), old.sharding) if name in controls else old
            for name, old in state.controls.items()
        })
        memory["stop"] = stop or ""
    return found.get(built.monitor), state


def _moved(ready: Prepared, state, memory: dict, gates, at: int) -> Finding | None:
    """Whether what no update may change has changed; told once."""
    if _frozen_print(ready, state) == memory["frozen"] or "frozen_moved" in memory["gates"]["told"]:
        return None
    memory["gates"] = memory["gates"] | {"told": sorted([*memory["gates"]["told"], "frozen_moved"])}
    return gates.judged(Finding(
        "frozen_moved", "error", f"update {at}: the checksum of teachers and frozen parameters is not that of the start",
        "a frozen parameter or a teacher is no longer what it was at the start",
        "look at what writes to them, and run again from the start: what was learned since has another teacher",
    ))


def _row(ready: Prepared, state, memory: dict, checkpoints: Checkpoints, jitted: dict) -> dict:
    """One line of the table: the test split, measured on the last and on the best parameters."""
    built = ready.built
    last = _bare(evaluate(ready, deployed(state), state.extra, test=True, cache=jitted))
    best = {"step": int(state.step), **last}
    if checkpoints.best not in (None, int(state.step)):
        saved, _ = checkpoints.load(checkpoints.best, ready.abstract)
        best = {"step": checkpoints.best, **_bare(evaluate(ready, deployed(saved), saved.extra, test=True, cache=jitted))}
    return {
        "name": built.run.name, "seed": built.run.seed, **last, "best": best, "validation": memory["validation"],
        "steps": int(state.step), "skipped": int(state.skipped), "seconds": memory["seconds"], "stop": memory["stop"],
        "parameters": built.recipe.facts.get("parameters", sum(x.size for x in jax.tree.leaves(state.params))),
    }


def _bare(found: dict) -> dict:
    return {name.split("/", 1)[1]: value for name, value in found.items()}


def calibrated(ready: Prepared, state):
    """The state with what the recipe fits before the first update."""
    with contextlib.closing(ready.built.recipe.data("train", ready.built.run.seed)) as data:
        variables = ready.built.recipe.calibrate(Variables(state.params, state.extra), ready.frozen, map(ready.place, data))
    places = jax.tree.map(lambda x: x.sharding, Variables(state.params, state.extra))
    variables = sharding.put(variables, places)
    return state.replace(params=variables.params, extra=variables.extra)


def _frozen_print(ready: Prepared, state) -> int:
    """Of every bit that must not change: teachers, constants, frozen parameters."""
    return int(fingerprint((ready.frozen, optim.cut(state.params, ready.groups, frozen=True))))
