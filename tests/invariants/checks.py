"""What must hold of any recipe. Each check takes a Case; `Invariants` runs all of them: a later system inherits it.

    class TestMine(Invariants):
        @pytest.fixture(scope="class")
        @classmethod
        def case(cls):
            return Case(...)

Programs are compiled once a case and shared by its checks, with little optimisation: sizes here are a toy's.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.recipe import Dials
from jaxdistill.training import objective, state
from jaxdistill.training.prepare import Prepared

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
EXACT = 3e-6  # relative: what only adds up in another order


@dataclasses.dataclass
class Case:
    """A recipe under test: a run that is ready on one device, and what differs from recipe to recipe.

    Attributes:
      ready: with plain SGD (Adam divides rounding noise by itself where a gradient is near 0), no clip, and every term on by
        the end of the run.
      batch: a global batch of rows that hold different numbers of valid elements.
      remade: (mesh) -> the same run, ready on that mesh.
      padded: (batch) -> as many rows of padding more, and other content under the padding that was there.
      masked: (batch) -> the same shapes, and nothing in it counts.
      taught: () -> (a run of the same terms, parameters with which its student is its teacher).
      zero: the terms that are then 0. maskable: the terms to which `padded` and `masked` apply; None: all.
      inert: regex of leaves that cannot matter by arithmetic, so that their gradient is rounding alone.
      looks: probes that are there when an update is looked at, and only then.
    """

    ready: Prepared
    batch: dict
    remade: Callable | None = None
    padded: Callable | None = None
    masked: Callable | None = None
    taught: Callable | None = None
    zero: tuple[str, ...] = ()
    maskable: tuple[str, ...] | None = None
    inert: str = r"(?!)"
    looks: tuple[str, ...] = ("entropy", "spread", "correct", "logit_abs_max")
    programs: dict = dataclasses.field(default_factory=dict)

    @property
    def recipe(self):
        return self.ready.built.recipe

    def kept(self, name, make: Callable) -> Any:
        """make(), once."""
        if name not in self.programs:
            self.programs[name] = make()
        return self.programs[name]


@dataclasses.dataclass
class Found:
    """Of one batch: the gradient, the total, the terms and the probes."""

    grads: Any
    total: Any
    terms: dict
    probes: dict

    @property
    def raw(self) -> dict[str, float]:
        return {name: float(term.sum) / max(float(term.count), 1.0) for name, term in self.terms.items()}

    @property
    def counts(self) -> dict[str, float]:
        return {name: float(term.count) for name, term in self.terms.items()}

    def reached(self, *names: str) -> set[str]:
        """The leaves whose gradient is not 0 (to rounding), of these parts of the tree or of all."""
        found = set()
        for path, leaf in jax.tree.leaves_with_path(self.grads):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if float(jnp.abs(leaf).max()) > 1e-9 and (not names or name.startswith(names)):
                found.add(name)
        return found


def weights_of(recipe, controls: dict | None = None, at: float = 1e9) -> dict:
    """Each term's weight at update `at`, by default the last."""
    return objective.weights_at(recipe.weights, controls or {}, jnp.asarray(at))


def measure(case: Case, batch=None, *, micro=1, params=None, weights=None, knobs=None, probing=False) -> Found:
    """The gradient, as one update forms it. weights: of the terms that are to count; the others have 0. probing: whether the update is
    one of those that are looked at, by the same program."""
    recipe, s = case.recipe, case.ready.state
    program = case.kept(("gradients", micro), lambda: jax.jit(
        state.make_gradients(recipe, case.ready.groups, micro), compiler_options=QUICK))
    every = weights_of(recipe)
    if weights is not None:
        every = {name: jnp.asarray(weights.get(name, 0.0), jnp.float32) for name in every}
    turned = {name: schedule(jnp.asarray(1e9)) for name, schedule in recipe.knobs.items()}
    turned |= {name: jnp.asarray(value, jnp.float32) for name, value in (knobs or {}).items()}
    batch = jax.tree.map(jnp.asarray, case.batch if batch is None else batch)
    given = s.params if params is None else params, s.extra, case.ready.frozen
    return Found(*program(*given, batch, every, turned, jax.random.key(0), jnp.asarray(probing))[:4])


def gap(a, b) -> float:
    """|a - b| / |b| of two trees."""
    return float(optax.tree.norm(optax.tree.sub(a, b))) / max(float(optax.tree.norm(b)), 1e-30)


def same(a: Found, b: Found, within: float, names=None) -> None:
    """Value, terms (or those `names`) and gradient, each part of the tree by itself: a small one is not lost beside a large one."""
    assert float(a.total) == pytest.approx(float(b.total), rel=within, abs=1e-9)
    for name in names or b.terms:
        assert a.raw[name] == pytest.approx(b.raw[name], rel=within, abs=1e-7), name
    for part in b.grads:
        assert gap(a.grads[part], b.grads[part]) < within, part


def values(recipe, ready: Prepared, batch, *, params=None, knobs=None) -> dict[str, float]:
    """The raw value of each term of `recipe`, on what `ready` holds. (No gradient: that is most of the compilation.)"""
    turned = {name: schedule(jnp.asarray(1e9)) for name, schedule in recipe.knobs.items()} | (knobs or {})

    def terms(params, extra, frozen, batch):
        _, aux = recipe.loss(params, extra, frozen, batch, Dials(weights_of(recipe), turned), jax.random.key(0))
        terms = aux.terms | recipe.whole(params, extra, aux.stats, turned)[0]
        return {name: term.sum / jnp.maximum(term.count, 1) for name, term in terms.items()}

    s = ready.state
    found = jax.jit(terms, compiler_options=QUICK)(s.params if params is None else params, s.extra, ready.frozen, batch)
    return {name: float(value) for name, value in found.items()}


def maskable(case: Case) -> dict | None:
    return None if case.maskable is None else dict.fromkeys(case.maskable, 1.0)


def a_student_equal_to_its_teacher_has_nothing_to_learn(case: Case) -> None:
    ready, params = case.taught()
    found = values(ready.built.recipe, ready, case.batch, params=params)
    assert {name: found[name] for name in case.zero} == pytest.approx(dict.fromkeys(case.zero, 0.0), abs=2e-6)
    at_odds = measure(case).raw
    assert all(at_odds[name] > 1e-3 for name in case.zero)  # and the terms do see a difference where there is one


def padding_changes_nothing(case: Case) -> None:
    more = case.padded(case.batch)
    assert len(next(iter(more.values()))) > len(next(iter(case.batch.values())))
    found = measure(case, more, weights=maskable(case))
    plain = measure(case, weights=maskable(case))
    same(found, plain, 1e-5, case.maskable)
    names = case.maskable or plain.terms
    assert {name: found.counts[name] for name in names} == {name: plain.counts[name] for name in names}


def an_all_masked_batch_is_zero_with_zero_gradients(case: Case) -> None:
    found = measure(case, case.masked(case.batch), weights=maskable(case))
    assert float(found.total) == 0
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(found.grads))


def micro_batches_are_one_batch(case: Case, micro: int) -> None:
    one, found = measure(case), measure(case, micro=micro)
    assert found.counts == one.counts
    same(found, one, EXACT)


def probes_change_no_bit(case: Case) -> None:
    """Of the gradient and the ledger, by the program that serves both; and where nobody looks there is nothing to see."""
    plain, found = measure(case), measure(case, probing=True)
    for a, b in zip(*(jax.tree.leaves((each.grads, each.total, each.terms)) for each in (plain, found)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    new = {name for name, (_, count) in found.probes.items() if count > 0 and not plain.probes[name][1]}
    assert new >= set(case.looks)
    assert all(np.isfinite(float(total)) for total, _ in found.probes.values())


def counts_do_not_depend_on_parameters(case: Case) -> None:
    lost = jax.tree.map(lambda x: x * jnp.nan, case.ready.state.params)
    found = measure(case, params=lost)
    assert not np.isfinite(float(found.total))
    assert found.counts == measure(case).counts


def the_teacher_gets_no_gradient(case: Case) -> None:
    """Not through the loss, and not through the terms of the whole batch; though the loss depends on it."""
    recipe, s = case.recipe, case.ready.state
    weights = weights_of(recipe)
    knobs = {name: schedule(jnp.asarray(1e9)) for name, schedule in recipe.knobs.items()}
    batch = jax.tree.map(jnp.asarray, case.batch)

    def total(teacher):
        frozen = case.ready.frozen | {"teacher": teacher}
        share, aux = recipe.loss(s.params, s.extra, frozen, batch, Dials(weights, knobs), jax.random.key(0))
        terms, _ = recipe.whole(s.params, s.extra, aux.stats, knobs)
        return share + sum(weights[name] * term.sum for name, term in terms.items())

    program = jax.jit(jax.value_and_grad(total), compiler_options=QUICK)
    value, pull = program(case.ready.frozen["teacher"])
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(pull))
    other, _ = program(jax.tree.map(lambda x: x * 1.5, case.ready.frozen["teacher"]))
    assert abs(float(other / value) - 1) > 1e-4


def every_trainable_leaf_is_reached_by_a_term(case: Case) -> None:
    wanted = {path for path, moved in _leaves(case) if moved and not re.search(case.inert, path)}
    found = set().union(*(measure(case, weights={name: 1.0}).reached() for name in weights_of(case.recipe)))
    assert wanted - found == set()


def _leaves(case: Case):
    for (path, group) in jax.tree.leaves_with_path(case.ready.groups):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), not group.frozen


@dataclasses.dataclass
class Trajectory:
    losses: list
    metrics: list
    params: dict  # after update 2
    before: dict
    after: dict


def trajectory(case: Case, ready: Prepared, updates: int) -> Trajectory:
    """The first updates of a run, by one compiled program: it takes no batch or state of another shape or type."""
    data = ready.built.recipe.data("train", 0)
    now = jax.tree.map(jnp.copy, ready.state)
    program = ready.step.lower(ready.state, ready.frozen, ready.place(case.batch)).compile(compiler_options=QUICK)
    before, metrics, second = jax.device_get(now.params), [], None
    for number in range(updates):
        now, seen = program(now, ready.frozen, ready.place(case.batch if number == 0 else next(data)))
        metrics.append(jax.device_get(seen))
        if number == 1:
            second = jax.device_get(now.params)
    return Trajectory([float(m["loss"]) for m in metrics], metrics, second, before, jax.device_get(now.params))


def whole_run(case: Case) -> Trajectory:
    return case.kept("trajectory", lambda: trajectory(case, case.ready, case.ready.built.train.steps))


def the_ledger_adds_up_at_every_update(case: Case) -> None:
    """Also while ramps pass through zero; and every line is weight * raw."""
    for metrics in whole_run(case).metrics:
        assert metrics["finite"]
        assert metrics["gap"] < 1e-5
        lines = metrics["terms"]
        assert float(sum(line["weighted"] for line in lines.values())) == pytest.approx(float(metrics["loss"]), rel=1e-5, abs=1e-7)


def everything_trainable_moves_and_nothing_else(case: Case) -> None:
    run, moved = whole_run(case), {}
    for (path, a), b in zip(jax.tree.leaves_with_path(run.before), jax.tree.leaves(run.after), strict=True):
        moved[jax.tree_util.keystr(path, simple=True, separator="/")] = not np.array_equal(a, b)
    inert = {path for path in moved if re.search(case.inert, path)}
    assert moved == dict(_leaves(case)) | {path: moved[path] for path in inert}


def one_program_serves_all_updates(case: Case) -> None:
    """Schedules moved, and the program that was compiled for the first update took every other."""
    run = whole_run(case)
    for name, schedule in case.recipe.knobs.items():
        seen = [float(metrics["knobs"][name]) for metrics in run.metrics]
        assert (len(set(seen)) > 1) == (schedule.constant is None), name
    shapes = [jax.tree.map(lambda x: (np.shape(x), np.asarray(x).dtype), metrics) for metrics in run.metrics]
    assert all(one == shapes[0] for one in shapes)


def meshes_agree(case: Case, mesh: tuple[int, int, int]) -> None:
    one, ready = whole_run(case), case.remade(mesh)
    found = trajectory(case, ready, 2)
    np.testing.assert_allclose(found.losses, one.losses[:2], rtol=1e-5)
    for part in one.params:
        assert gap(found.params[part], one.params[part]) < 1e-5, part


class Invariants:
    """All checks of one case, as tests."""

    def test_a_student_equal_to_its_teacher_has_nothing_to_learn(self, case):
        if not case.taught:
            pytest.skip("no teacher, or none that the student can equal")
        a_student_equal_to_its_teacher_has_nothing_to_learn(case)

    def test_padding_changes_nothing(self, case):
        padding_changes_nothing(case)

    def test_an_all_masked_batch_is_zero_with_zero_gradients(self, case):
        an_all_masked_batch_is_zero_with_zero_gradients(case)

    @pytest.mark.parametrize("micro", [2, 4])
    def test_micro_batches_are_one_batch(self, case, micro):
        micro_batches_are_one_batch(case, micro)

    def test_probes_change_no_bit(self, case):
        probes_change_no_bit(case)

    def test_counts_do_not_depend_on_parameters(self, case):
        counts_do_not_depend_on_parameters(case)

    def test_the_teacher_gets_no_gradient(self, case):
        if "teacher" not in case.ready.frozen:
            pytest.skip("no teacher")
        the_teacher_gets_no_gradient(case)

    def test_every_trainable_leaf_is_reached_by_a_term(self, case):
        every_trainable_leaf_is_reached_by_a_term(case)

    def test_the_ledger_adds_up_at_every_update(self, case):
        the_ledger_adds_up_at_every_update(case)

    def test_everything_trainable_moves_and_nothing_else(self, case):
        everything_trainable_moves_and_nothing_else(case)

    def test_one_program_serves_all_updates(self, case):
        one_program_serves_all_updates(case)

    @pytest.mark.parametrize("mesh", [(2, 2, 2)], ids=str)  # all axes at once; each mesh costs a program
    def test_meshes_agree(self, case, mesh):
        meshes_agree(case, mesh)
