"""Which terms reach which parameter, read off the program and not off its numbers.

A parameter whose gradient is always zero is only sick if some active term should move it. The numbers cannot tell
(a dead unit's gradient is zero too); the program can: a gradient depends on a term's weight iff the term reaches it.
"""

from collections.abc import Callable

import jax


def reach(gradients: Callable, weights: dict, *args) -> list[frozenset[str]]:
    """gradients(weights, *args) -> tree of gradients; for each of its leaves, the names of the weights it depends on.

    weights and args may be jax.ShapeDtypeStruct trees: nothing is computed."""
    names = sorted(weights)
    closed = jax.make_jaxpr(gradients)(weights, *args)
    marks = [1 << index for index in range(len(names))] + [0] * (len(closed.jaxpr.invars) - len(names))
    return [
        frozenset(name for index, name in enumerate(names) if mark >> index & 1)
        for mark in _flow(closed.jaxpr, marks)
    ]


def _flow(jaxpr, marks: list[int]) -> list[int]:
    """Bit sets of the inputs' sources -> bit sets of the outputs'."""
    of = dict(zip(jaxpr.invars, marks, strict=True))
    read = lambda atom: of.get(atom, 0) if not hasattr(atom, "val") else 0  # noqa: E731  (a literal has a value)
    for equation in jaxpr.eqns:
        outs = _through(equation, [read(atom) for atom in equation.invars])
        of.update(zip(equation.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _through(equation, marks: list[int]) -> list[int]:
    params, name = equation.params, equation.primitive.name
    together = 0
    for mark in marks:
        together |= mark
    everything = [together] * len(equation.outvars)
    if name == "cond":
        outs = [_flow(branch.jaxpr, marks[1:]) for branch in params["branches"]]
        return [marks[0] | _union(column) for column in zip(*outs, strict=True)]
    if name == "scan":
        fixed, carried = params["num_consts"], params["num_carry"]
        while True:  # what a round leaves in the carry enters the next: repeat until nothing is added
            outs = _flow(params["jaxpr"].jaxpr, marks)
            carry = [before | after for before, after in zip(marks[fixed:fixed + carried], outs[:carried], strict=True)]
            if carry == marks[fixed:fixed + carried]:
                return outs
            marks = [*marks[:fixed], *carry, *marks[fixed + carried:]]
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    inner = getattr(inner, "jaxpr", inner)
    if inner is None or len(inner.invars) != len(marks) or len(inner.outvars) != len(equation.outvars):
        return everything  # an ordinary primitive, or a loop form that is not worth a rule
    return _flow(inner, marks)


def _union(marks) -> int:
    whole = 0
    for mark in marks:
        whole |= mark
    return whole
