"""Faults planted for real: a few words of the library's source are exchanged, while the rest of the program runs as it is.

What is exchanged is the code of a function, in place: whoever holds that function (another module, a table of losses, a method) then
calls the mutant. Programs that JAX has compiled of it, and what the library remembers, are forgotten on the way in and out.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator

import jax


class Gone(Exception):
    """The place that a mutation changes is no longer there, or no longer reads as it did. Nothing was planted."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """In the function at `place`, as in "jaxdistill.models.kaf:KAF.__call__", `old` becomes `new`. old: source that stands there once."""

    place: str
    old: str
    new: str


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One fault.

    Attributes:
      name: unique.
      edits: how it is planted.
      check: fails on the mutant and passes without it. Its parameters are fixtures.
      finding: what the doctor should say of a run with it; "" where a run does not show it, or where no finding is of this fault.
    """

    name: str
    edits: tuple[Edit, ...]
    check: Callable
    finding: str = ""


@contextlib.contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """The library, with this fault in it.

    Raises:
      Gone: before anything is changed."""
    mutants = [(function, _mutant(function, edits)) for function, edits in _by_function(mutation)]
    before = [function.__code__ for function, _ in mutants]
    try:
        for function, code in mutants:
            function.__code__ = code
        forget()
        yield
    finally:
        for (function, _), code in zip(mutants, before, strict=True):
            function.__code__ = code
        forget()


def forget() -> None:
    """Drops whatever was computed with the code as it was."""
    jax.clear_caches()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "jaxdistill" and module is not None:
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def find(place: str) -> types.FunctionType:
    """The function itself, inside whatever wraps it (jit, flax, shape checks)."""
    module, _, path = place.partition(":")
    try:
        found = importlib.import_module(module)
        for name in path.split("."):
            found = inspect.getattr_static(found, name)
    except (ImportError, AttributeError) as error:
        raise Gone(f"{place}: {error}") from None
    while not isinstance(found, types.FunctionType) or hasattr(found, "__wrapped__"):
        inner = next((getattr(found, name) for name in ("__wrapped__", "__func__", "fget", "fun") if hasattr(found, name)), None)
        if inner is None:
            raise Gone(f"{place}: found a {type(found).__name__}, which is no function")
        found = inner
    return found


def _by_function(mutation: Mutation) -> list[tuple[types.FunctionType, list[Edit]]]:
    places: dict[str, list[Edit]] = {}
    for edit in mutation.edits:
        places.setdefault(edit.place, []).append(edit)
    return [(find(place), edits) for place, edits in places.items()]


def _mutant(function: types.FunctionType, edits: list[Edit]) -> types.CodeType:
    """The code of `function` after the edits, with the same variables of the scopes around it."""
    source = textwrap.dedent(inspect.getsource(function))
    for edit in edits:
        if (count := source.count(edit.old)) != 1:
            raise Gone(f"{edit.place}: found {edit.old!r} {count} times; accepted: once")
        if edit.old == edit.new:
            raise Gone(f"{edit.place}: found {edit.new!r} for itself; accepted: something else")
        source = source.replace(edit.old, edit.new)
    tree = ast.parse(source)
    (definition,) = tree.body
    definition.decorator_list = []
    names = function.__code__.co_freevars
    if names:  # a method that says super(), say: these names must be of a scope around it again
        around = ast.parse(f"def around({', '.join(names)}):\n    pass").body[0]
        around.body = [definition]
        tree.body = [around]
    code = compile(ast.fix_missing_locations(tree), f"<mutant of {edits[0].place}>", "exec")
    for name in (("around",) if names else ()) + (function.__name__,):
        code = next(each for each in code.co_consts if isinstance(each, types.CodeType) and each.co_name == name)
    if set(code.co_freevars) != set(names):
        raise Gone(f"{edits[0].place}: the mutant uses {code.co_freevars} of the scopes around it, the function {names}")
    return code
