"""Options that count only beside another one: of no other value than the default is one taken in silence that nothing uses.

A recipe says so in a table of `Needs`. What is judged is what a recipe does by choice (a mode, a kind), never that the weight of a term
is 0: a run that leaves a term out to compare with has the options of the job that it is of.
"""

from typing import Any, NamedTuple


class Needs(NamedTuple):
    """`options` are used while `switch` is one of `values`, or without values while it is on (neither 0, nor empty, nor always 0); all
    are keys, "section.option"."""

    switch: str
    values: tuple
    options: tuple[str, ...]

    def met(self, found: Any) -> bool:
        return found in self.values if self.values else on(found)


def on(value: Any) -> bool:
    """Whether a number or a ramp is ever other than 0."""
    return any(knot[1] for knot in value) if isinstance(value, (tuple, list)) else bool(value)


def note_unused(config, needs: tuple[Needs, ...], **sections: Any) -> None:
    """Tells `config` (a training.plan.Watched) which options this run does not use. sections: as they were built, by name."""

    def of(key: str, source=lambda section: section):
        section, option = key.split(".")
        return getattr(source(sections[section]), option)

    for one in needs:
        found = of(one.switch)
        if not one.met(found):
            counts = " or ".join(map(repr, one.values)) or "one that is on"
            for key in one.options:
                config.leave(key, of(key, type), f"with {one.switch} {found!r}, which does not use it ({counts} does)")
