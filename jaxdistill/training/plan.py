"""The plan of a job: its config, read under watch, as an ordered list of runs, each with an identity.

`config.runs` names the runs in order; `config.run.NAME` says what each of them is and what it changes of the rest:
    recipe        file of jaxdistill/recipes, or a dotted path
    once          one run for all seeds (a teacher), not one a seed
    only_seeds    of the job's seeds, those that this run is for; (): all of them
    cached        keep the finished run by content, for any later job that wants the same one
    fills, given  the key of later runs that this run's exported folder fills; where the user has set that key already,
                  `given` is the key of this run that takes the user's folder, which is then measured and not trained
                  (of a tuple of folders each, by runs NAME_1, NAME_2 and so on)
    seconds_of, pace_of   train for as many seconds as the first took, at the seconds an update of the second
Everything else in it overrides the config's key of that name, for that run.
"""

import ast
import contextlib
import dataclasses
import hashlib
import json
from typing import Any

from ml_collections import ConfigDict

from jaxdistill import UserError
from jaxdistill.recipe import code
from jaxdistill.training.defaults import defaults

RUN_KEYS = {"recipe": "", "once": False, "cached": False, "only_seeds": (), "fills": "", "given": "", "seconds_of": "", "pace_of": ""}
DEFAULTS = defaults().to_dict()
JOB_KEYS = ("seeds", "runs", "run", "cache", "mesh", "headline")  # of the job, not of a run: no part of any run's identity


class Watched:
    """A read-only view of a config that remembers which keys were read. Missing keys are one clear error."""

    def __init__(self, values: dict, origin: dict, read: set, path: str = "", idle: dict | None = None):
        self._values, self._origin, self._read, self._path, self._idle = values, origin, read, path, {} if idle is None else idle

    def __getitem__(self, name: str) -> Any:
        where = f"{self._path}{name}"
        if name not in self._values:
            raise UserError(f"config key {where}: missing; accepted here: {', '.join(sorted(self._values))}")
        value = self._values[name]
        if isinstance(value, dict):
            return Watched(value, self._origin, self._read, f"{where}.", self._idle)
        self._read.add(self._origin.get(where, where))
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def section(self, name: str) -> "Watched":
        """A section that a config may leave out: it is then empty, and every key of it at its default."""
        return self[name] if name in self else Watched({}, self._origin, self._read, f"{self._path}{name}.", self._idle)

    def keys(self):
        return self._values.keys()  # with __getitem__, this makes **section work

    def leave(self, key: str, default: Any, why: str) -> None:
        """Nothing of this run uses `key`, though it is one of its recipe's: as if it had not been read. Where no run of a job uses it,
        any other value than `default` is an error, which ends with `why`."""
        where = self._origin.get(f"{self._path}{key}", f"{self._path}{key}")
        self._read.discard(where)
        self._idle[where] = default, why

    def build(self, kind: type) -> Any:
        """This section as a dataclass `kind`: every field must be a key and every key a field, of its type."""
        fields = {field.name: field for field in dataclasses.fields(kind)}
        section = self._path.rstrip(".")
        for name in self.keys() - fields.keys():
            raise UserError(f"config key {self._path}{name}: found in {section}, which has no such key; "
                            f"accepted: {', '.join(fields)}")
        given = {name: self[name] for name in self.keys()}
        for name, value in given.items():
            check_type(f"{self._path}{name}", value, fields[name].type)
        missing = [n for n, f in fields.items() if n not in given and f.default is dataclasses.MISSING]
        if missing:
            raise UserError(f"config key {self._path}{missing[0]}: missing; accepted: {', '.join(fields)}")
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def check_type(key: str, value: Any, kind: Any) -> None:
    """One line where `value` is not of `kind` (int, float, str, bool, tuple or dict; an int is a float too)."""
    kinds = {int: (int,), float: (int, float), str: (str,), bool: (bool,), tuple: (tuple, list), dict: (dict,)}
    allowed = kinds.get(kind)
    if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool)):
        wanted = "a section" if kind is dict else kind.__name__
        raise UserError(f"config key {key}: found {value!r} ({type(value).__name__}); accepted: {wanted}")


def check_defaults(values: dict, keys, origin: dict | None = None) -> None:
    """`keys` of the defaults must be in `values`, of their type. origin: as in `Run`."""
    for key in keys:
        where = (origin or {}).get(key, key)
        if key not in values:
            raise UserError(f"config key {where}: missing; accepted: a config that starts from jaxdistill.training.defaults")
        check_type(where, values[key], type(DEFAULTS[key]))


@dataclasses.dataclass
class Run:
    """One run of a job: `values` is its effective config as a nested dict, `origin` maps each of its keys to the
    key the user would change. idle: of what it knows and does not use, the default and why (Watched.leave)."""

    name: str
    seed: int
    spec: dict
    values: dict
    origin: dict
    read: set
    idle: dict = dataclasses.field(default_factory=dict)
    filled: dict = dataclasses.field(default_factory=dict)  # key -> the earlier run whose folder it was given

    @property
    def id(self) -> str:
        return f"{self.name}-{self.seed}"

    @property
    def config(self) -> Watched:
        return Watched(self.values, self.origin, self.read, idle=self.idle)

    def get(self, key: str) -> Any:
        node = self.values
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def set(self, key: str, value: Any) -> None:
        *parents, last = key.split(".")
        node = self.values
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value


def as_dict(config: Any) -> dict:
    return config.to_dict() if isinstance(config, ConfigDict) else config


def leaves(tree: dict, path: str = "") -> dict[str, Any]:
    """Nested dict -> {'a.b.c': value}."""
    flat = {}
    for name, value in tree.items():
        flat |= leaves(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return flat


def expand(config: Any, *, everything: bool = False) -> list[Run]:
    """The runs of a job, in order: those `once` first come first, the others for each seed.

    everything: all runs that are defined, each once with the first seed, in the order of `runs` and then by name."""
    config = as_dict(config)
    check_defaults(config, JOB_KEYS)
    names, seeds, defined = list(config["runs"]), list(config["seeds"]), ", ".join(config["run"])
    if not seeds or any(type(seed) is not int or not 0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"config key seeds: found {tuple(seeds)}; accepted: different whole numbers below 2^32, as in (0, 1, 2)")
    if any(type(size) is not int for size in config["mesh"]):
        raise UserError(f"config key mesh: found {tuple(config['mesh'])}; accepted: whole numbers, as in (-1, 1, 1)")
    for name in names:
        if name not in list(config["run"]) or names.count(name) > 1:  # (a list: what is found may not be hashable)
            raise UserError(f"config key runs: found {name!r}{' twice' * (names.count(name) > 1)}; accepted: {defined}, each once")
    if not names:
        raise UserError(f"config key runs: found (); accepted: some of {defined}")
    if config["headline"] not in ("", *config["run"]):
        raise UserError(f"config key headline: found {config['headline']!r}; accepted: {defined}, or '' for none")
    if everything:
        names, seeds = names + [name for name in config["run"] if name not in names], seeds[:1]
    runs = []
    for index, seed in enumerate(seeds):
        for name in names:
            for run in _effective(config, name, seed):
                if everything or (seed in (run.spec["only_seeds"] or seeds) and (index == 0 or not run.spec["once"])):
                    runs.append(run)
    if not everything:
        _check_pace(runs)
    return runs


def _check_pace(runs: list[Run]) -> None:
    """A run that is paced by others must come after them for each of its seeds: told before any of them trains."""
    earlier = set()
    for run in runs:
        for key in ("seconds_of", "pace_of") if run.spec["seconds_of"] or run.spec["pace_of"] else ():
            if f"{run.spec[key]}-{run.seed}" not in earlier:
                raise UserError(f"config key run.{run.name}.{key}: found {run.spec[key]!r}; accepted: a run that comes earlier in runs")
        earlier.add(run.id)


def _effective(config: dict, name: str, seed: int) -> list[Run]:
    """The run of that name; where it measures the user's folders, one for each of them."""
    chosen = config["run"][name]
    check_type(f"run.{name}", chosen, dict)
    spec = RUN_KEYS | {key: value for key, value in chosen.items() if key in RUN_KEYS}
    for key, value in spec.items():
        check_type(f"run.{name}.{key}", value, type(RUN_KEYS[key]))
    if not spec["recipe"]:
        raise UserError(f"config key run.{name}.recipe: missing; accepted: a recipe's name or dotted path")
    overrides = {key: value for key, value in chosen.items() if key not in RUN_KEYS}
    base = {key: value for key, value in config.items() if key not in JOB_KEYS}
    values = _tuples(_merge(base, overrides, f"run.{name}.")) | {"seed": seed}
    origin = {key: f"run.{name}.{key}" for key in leaves(overrides)} | {"seed": "seeds"}
    check_defaults(values, [key for key in DEFAULTS if key not in JOB_KEYS], origin)
    run = Run(name, seed, spec, values, origin, set())
    theirs = run.get(spec["fills"]) if spec["fills"] else None
    if not theirs:
        return [run]
    # The user's own: measured, not trained.
    if run.get(spec["given"]) is None:
        raise UserError(f"config key run.{name}.given: missing, or no key of the config (found {spec['given']!r}), though "
                        f"{spec['fills']} is given; accepted: the key that takes the folder, as in 'model.path'")
    folders = list(theirs) if isinstance(theirs, (tuple, list)) else [theirs]
    names = [f"{name}_{i + 1}" for i in range(len(folders))] if len(folders) > 1 else [name]
    if taken := [one for one in names if one != name and one in config["run"]]:
        raise UserError(f"config key run.{taken[0]}: found beside {len(folders)} folders in {spec['fills']}, of which {name} would "
                        "measure one by that name; accepted: another name")
    runs = [dataclasses.replace(run, name=one, values=_merge(values, {}), read=set(), idle={}) for one in names]
    for one, folder in zip(runs, folders, strict=True):
        one.set(spec["given"], folder)
        one.set("train.steps", 0)
    return runs


def _tuples(value: Any) -> Any:
    """A flag gives a key that held a text (`teacher.path`) "('a', 'b')" as a text: the tuple that it means."""
    if isinstance(value, dict):
        return {name: _tuples(one) for name, one in value.items()}
    if isinstance(value, str) and value.startswith("(") and value.endswith(")"):
        with contextlib.suppress(ValueError, SyntaxError):
            found = ast.literal_eval(value)
            if isinstance(found, tuple) and all(isinstance(one, str) for one in found):
                return found
    return value


def _merge(base: dict, over: dict, path: str = "") -> dict:
    merged = {name: _merge(value, {}) if isinstance(value, dict) else value for name, value in base.items()}
    for name, value in over.items():
        if isinstance(merged.get(name), dict):
            check_type(path + name, value, dict)
        both = isinstance(value, dict) and isinstance(merged.get(name, {}), dict)
        merged[name] = _merge(merged.get(name, {}), value, f"{path}{name}.") if both else value
    return merged


def unread(config: Any, runs: list[Run]) -> None:
    """A key of the config that no run read is an error, but for one that some know, at its default."""
    config = as_dict(config)
    known = {f"run.{name}.{key}" for name in config["run"] for key in RUN_KEYS} | set(JOB_KEYS)
    read, idle = set().union(*(run.read for run in runs)), {key: told for run in runs for key, told in run.idle.items()}
    found = {key: value for key, value in sorted(leaves(config).items()) if key not in read and key not in known}
    for key, value in found.items():
        default, why = idle.get(key, (value, ""))
        if value != default:
            raise UserError(f"config key {key}: found {value!r}; accepted: {default!r} {why}")
    if unknown := [key for key in found if key not in idle]:
        raise UserError(f"config key {unknown[0]}: nothing reads it" + (f" (nor {', '.join(unknown[1:])})" if unknown[1:] else "")
                        + "; accepted: keys that a run of this config uses")


def identity(run: Run, facts: dict) -> dict:
    """What a run that is built is made from: every value that it read, its seed, the facts of its recipe (content hashes), and the code
    of a recipe from outside the package.

    A teacher is therefore the same one whatever the config says of the students that it will teach."""
    recipe = run.spec["recipe"]
    own = {} if (sha := code(recipe)) is None else {"recipe's code": sha}
    config = {key: value for key, value in leaves(run.values).items() if key == "seed" or run.origin.get(key, key) in run.read}
    return json.loads(json.dumps({"recipe": recipe, **own, "config": config | run.filled, "facts": facts}))


def difference(found: dict, wanted: dict, path: str = "", sides: tuple[str, str] = ("there", "now")) -> list[str]:
    """The keys in which two identities differ, each with both values. sides: what the two are called."""
    names = []
    for key in sorted(found.keys() | wanted.keys()):
        a, b = found.get(key, "missing"), wanted.get(key, "missing")
        if isinstance(a, dict) and isinstance(b, dict):
            names += difference(a, b, f"{path}{key}.", sides)
        elif a != b:
            names.append(f"{path}{key} ({sides[0]} {_short(a)}, {sides[1]} {_short(b)})")
    return names


def _short(value: Any) -> str:
    return text if len(text := str(value)) <= 40 else text[:37] + "..."


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
