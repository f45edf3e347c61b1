"""A fault is planted where it says, in whoever calls it, and leaves nothing behind; one that has lost its place says so."""

import jax
import jax.numpy as jnp
import pytest

from jaxdistill.evaluators import language
from jaxdistill.losses import divergences
from tests.mutations.planting import Edit, Gone, Mutation, find, planted

PLACE = "jaxdistill.losses.divergences:forward_kl"
RETURN = "jnp.sum(p * (t - s), axis=-1)"


def mutation(*edits: Edit) -> Mutation:
    return Mutation("one", edits, lambda: None)


def test_whoever_holds_the_function_calls_the_mutant_and_afterwards_the_function():
    zero, one = jnp.zeros((1, 3)), jnp.asarray([[1.0, 0.0, 0.0]])
    compiled = jax.jit(divergences.KINDS["forward_kl"][0])
    ways = (divergences.forward_kl, language.forward_kl, compiled, lambda t, s: divergences.reverse_kl(s, t))
    before = [float(way(one, zero)[0]) for way in ways]
    with planted(mutation(Edit(PLACE, RETURN, f"7 + {RETURN}"))):  # of a sum that is divided by that of the exponentials
        assert all(float(way(one, zero)[0]) > value + 1 for way, value in zip(ways, before, strict=True))
    assert [float(way(one, zero)[0]) for way in ways] == before
    with pytest.raises(ZeroDivisionError), planted(mutation(Edit(PLACE, RETURN, f"7 + {RETURN}"))):
        raise ZeroDivisionError
    assert [float(way(one, zero)[0]) for way in ways] == before


@pytest.mark.parametrize("place", [
    "jaxdistill.models.kaf:KAF.__call__", "jaxdistill.models.kaf:_kaf", "jaxdistill.diagnosis.probes:fingerprint",
    "jaxdistill.data.sequences:_load", "jaxdistill.recipe:Schedule.ramp", "jaxdistill.training.checkpoint:Checkpoints.best",
])  # fmt: skip
def test_it_finds_the_function_inside_what_wraps_it(place):
    assert find(place).__code__.co_filename.endswith(place.split(":")[0].replace(".", "/") + ".py")
    assert find(place).__name__ == place.split(":")[1].split(".")[-1]


@pytest.mark.parametrize("edit", [
    Edit("jaxdistill.losses.nothing:forward_kl", RETURN, "0"), Edit("jaxdistill.losses.divergences:forward", RETURN, "0"),
    Edit("jaxdistill.losses.divergences:KINDS", RETURN, "0"), Edit(PLACE, "what is not there", "0"), Edit(PLACE, "jnp.sum", "0"),
    Edit(PLACE, RETURN, RETURN),
], ids=["module", "name", "no function", "words", "twice", "no change"])  # fmt: skip
def test_a_place_that_is_gone_is_said_and_nothing_is_planted(edit):
    before = find(PLACE).__code__
    right = Edit(PLACE, RETURN, "0")
    with pytest.raises(Gone), planted(mutation(right, edit)):
        pytest.fail("planted")
    assert find(PLACE).__code__ is before
