"""lm and student_aware by logits: what evaluation, ledger and jobs promise. (What holds of any recipe: tests/invariants.)"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.data import text
from jaxdistill.evaluators import language
from jaxdistill.models import gpt2
from jaxdistill.recipe import Dials
from jaxdistill.recipes.lm import next_token
from jaxdistill.training import loop, prepare
from tests.invariants.checks import QUICK
from tests.recipes.conftest import TEXT, config, ready


def batches(one, count=1):
    data = one.built.recipe.data("train", 0)
    return [next(data) for _ in range(count)]


def loss(one, params, batch, frozen=None, scale=None):
    recipe = one.built.recipe
    _, _, where, _ = next_token(batch)
    scale = scale or {name: 1.0 / max(where.sum(), 1) for name in recipe.weights if not recipe.weights[name].off}
    dials = Dials(scale, {name: jnp.float32(2.0) for name in recipe.knobs})
    return recipe.loss(params, {}, frozen or one.frozen, batch, dials, jax.random.key(0))


@pytest.fixture(scope="module")
def kd(job):
    return ready(job)


def device(batch):
    return jax.tree.map(jnp.asarray, batch)


def test_evaluation_finds_a_student_equal_to_its_teacher(job):
    one = ready(job, student=dict(path=str(job / "teacher")))
    found = prepare.evaluate(one, one.state.params, {}, test=True, cache={})
    assert abs(found["test/teacher_kl"]) < 1e-6
    assert found["test/top1_agreement"] == 1.0


def test_next_token_masks_padding_and_the_seams_between_documents():
    batch = {"tokens": np.arange(1, 8)[None], "segments": np.array([[1, 1, 1, 2, 2, 0, 0]]), "positions": np.zeros((1, 7), int),
             "valid": np.array([True])}
    tokens, labels, where, _ = next_token(batch)
    np.testing.assert_array_equal(labels - tokens, np.ones((1, 6)))
    np.testing.assert_array_equal(where, [[True, True, False, True, False, False]])
    assert not next_token(batch | {"valid": np.array([False])})[2].any()
    # Where it trains, the seam's label is the end of text; padding still has none.
    _, labels, where, _ = next_token(batch, 99)
    np.testing.assert_array_equal(where, [[True, True, True, True, False, False]])
    np.testing.assert_array_equal(labels[where], [2, 3, 99, 5])
    assert not next_token(batch | {"valid": np.array([False])}, 99)[2].any()


def test_labels_are_counted_before_training_as_they_are_in_it(kd):
    """Else the doctor takes the ends of short documents for padding that counts."""
    batch = batches(kd)[0]
    total, count = loss(kd, kd.state.params, device(batch))[1].probes["valid"]
    assert kd.built.recipe.preflight(None, batch)["valid"] == pytest.approx(float(total / count))


@pytest.mark.parametrize("recipe", ["lm", "student_aware"])
def test_a_student_learns_to_end_its_text(job, recipe):
    """At the last tokens of its documents, it says so."""
    one = ready(job, recipe=recipe, train=dict(steps=80, lr=2e-2), kd=dict(weight=((0.0, 0.0),)))
    corpus, data, state = text.load(text.TextConfig(**TEXT | dict(path=str(job / "text")))), one.built.recipe.data("train", 0), one.state
    batch = one.place(next(data))
    step = one.step.lower(state, one.frozen, batch).compile(compiler_options=QUICK)
    for _ in range(80):
        state, _ = step(state, one.frozen, batch)
        batch = one.place(next(data))
    params = jax.device_get(state.params)
    module = gpt2.GPT2(gpt2.GPT2Config(vocab=corpus.vocab, length=16, width=16, depth=1, heads=2))
    rows = device(corpus.splits["train"].rows(np.arange(len(corpus.splits["train"]))))
    segments = rows["segments"]
    logits, _ = module.apply({"params": params.get("student", params)}, rows["tokens"][:, :-1], segments=segments[:, :-1],
                             positions=rows["positions"][:, :-1])
    said = np.asarray(jax.nn.softmax(logits)[..., corpus.eos])
    last = (segments[:, 1:] != segments[:, :-1]) & (segments[:, 1:] > 0)
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    assert last.sum() >= 10
    assert said[last].mean() > 0.2
    assert said[inside].mean() < 0.05


def test_the_ledger_is_what_is_optimised(kd):
    """kd carries T^2, lm does not; weights 0.5 each; total is their sum."""
    from jaxdistill.losses.divergences import forward_kl

    batch = device(batches(kd)[0])
    tokens, _, where, layout = next_token(batch, 0)  # (of labels only the places matter here)
    student = gpt2.GPT2(gpt2.GPT2Config(vocab=kd.built.recipe.facts["vocab"], length=16, width=16, depth=1, heads=2))
    teacher, _ = gpt2.from_hf(kd.built.run.values["teacher"]["path"])
    ours, _ = student.apply({"params": kd.state.params["student"]}, tokens, **layout)
    theirs, _ = teacher.apply({"params": kd.frozen["teacher"]}, tokens, **layout)
    total, aux = loss(kd, kd.state.params, batch, scale={"lm": 0.25, "kd": 0.125})
    wanted = 4 * jnp.sum(forward_kl(theirs, ours, temperature=2.0, where=where))
    assert float(aux.terms["kd"].sum) == pytest.approx(float(wanted), rel=1e-5)
    assert float(total) == pytest.approx(float(0.25 * aux.terms["lm"].sum + 0.125 * aux.terms["kd"].sum), rel=1e-6)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 8, 1)], ids=str)
def test_meshes_share_the_memory(job, mesh):
    """Parameters and moments are cut, not copied."""
    one = ready(job, mesh=mesh, dry=True)
    held = jax.tree.leaves((one.abstract.params, one.abstract.opt))
    whole, here = (sum(math.prod(shape(x)) for x in held) for shape in (lambda x: x.shape, lambda x: x.sharding.shard_shape(x.shape)))
    assert here <= 1.05 * whole / (mesh[1] * mesh[2])


def test_kd_at_weight_0_leaves_the_teacher_out_of_the_step(job):
    """CE-only neither runs the teacher nor pays for it, and lists kd with count 0."""
    flops = []
    for weight in (0.5, 0.0):
        one = ready(job, kd=dict(weight=((0.0, weight),), temperature=((0.0, 2.0),)))
        compiled, gates = prepare.compile_step(one, one.place(batches(one)[0]))
        assert set(gates.reach) == {frozenset({"lm", "kd"} if weight else {"lm"})}
        flops.append(compiled.cost_analysis()["flops"])
        _, metrics = compiled(one.state, one.frozen, one.place(batches(one)[0]))
    assert flops[1] < 0.75 * flops[0]
    assert float(metrics["terms"]["kd"]["count"]) == 0
    assert float(metrics["terms"]["lm"]["weight"]) == 1


def test_bits_per_byte_by_hand():
    """Uniform over 256 ids, of which the odd ones have two bytes: 8 bits a token; padding and uncounted tokens are left out."""
    labels, where = jnp.arange(12).reshape(2, 6), jnp.arange(6)[None] < jnp.asarray([[6], [2]])
    sums = language.sums(jnp.zeros((2, 6, 256)), labels, where, 1 + jnp.arange(256) % 2, jnp.zeros((2, 6, 256)))
    found = language.finish({name: np.stack([value, value]) for name, value in sums.items()})
    assert found["bits_per_byte"] == pytest.approx(8 * 8 / 12, rel=1e-6)
    assert found["perplexity"] == pytest.approx(256, rel=1e-5)
    assert found["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert found["top1_agreement"] == found["top5_agreement"] == 1


@pytest.mark.parametrize("nll", [0.5, 30.0, 699.0, math.nan])
def test_perplexity_is_not_clamped(nll):
    """485,165,195 is exp(20), and was reported of losses beyond it."""
    found = language.finish({"tokens": np.array([2.0]), "bytes": np.array([9.0]), "nll": np.array([2 * nll])})
    assert math.log(found["perplexity"]) == pytest.approx(nll, nan_ok=True)


def test_top_k_agreement_is_where_the_teachers_choice_ranks():
    student = jnp.asarray([[[5.0, 4, 3, 2, 1, 0, -1]]] * 3)
    teacher = jnp.stack([jax.nn.one_hot(jnp.asarray([i]), 7) for i in (0, 3, 6)])
    labels, where = jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1), bool)
    found = language.sums(student, labels, where, jnp.ones(7, jnp.int32), teacher)
    assert (float(found["top1"]), float(found["top5"])) == (1, 2)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_student_that_says_nothing_does_not_agree(value):
    """Equal logits are placed by id, as argmax does: the teacher's choice is right one time in as many as there are."""
    rng, said = np.random.default_rng(0), jnp.full((50, 40, 20), value)
    labels, where = jnp.zeros((50, 40), jnp.int32), jnp.ones((50, 40), bool)
    found = language.sums(said, labels, where, jnp.ones(20, jnp.int32), jnp.asarray(rng.normal(size=(50, 40, 20))))
    wanted = (0, 0) if math.isnan(value) else (1 / 20, 5 / 20)
    assert (found["top1"] / 2000, found["top5"] / 2000) == pytest.approx(wanted, abs=0.03)


def test_of_no_token_nothing_is_known():
    names = ("tokens", "bytes", "nll", "kl", "top1", "top5", "projector_nll", "projector_tokens")
    found = language.finish(dict.fromkeys(names, np.zeros(1)))
    assert len(found) == 7
    assert all(math.isnan(value) for value in found.values())


def test_evaluation_sees_no_weight_temperature_or_smoothing(job):
    plain, other = ready(job), ready(job, kd=dict(weight=((0.0, 0.1), (0.5, 0.9)), temperature=((0.0, 4.0),)), lm=dict(smoothing=0.3))
    a, b = (prepare.evaluate(one, plain.state.params, {}, test=False, cache={}) for one in (plain, other))
    assert a == b


def test_a_job_ends_in_its_rows(job, tmp_path):
    """Teacher -> untouched -> CE-only -> KD -> CE-only for the same seconds, in one call; and the student's folder loads."""
    c = config(job)
    c.teacher.path = ""
    off = dict(weight=((0.0, 0.0),))
    c.runs = ("teacher", "untouched", "ce_only", "kd", "ce_only_same_seconds")
    c.run = dict(
        teacher=dict(recipe="lm", once=True, fills="teacher.path", given="model.path", model=dict(c.student), train=dict(steps=4)),
        untouched=dict(recipe="student_aware", train=dict(steps=0)), ce_only=dict(recipe="student_aware", kd=off),
        kd=dict(recipe="student_aware"),
        ce_only_same_seconds=dict(recipe="student_aware", kd=off, seconds_of="kd", pace_of="ce_only"),
    )
    results = loop.run(c, tmp_path / "w", quiet=True)
    assert [row["name"] for row in results["rows"]] == list(c.runs)
    assert all(row["bits_per_byte"] > 0 for row in results["rows"])
    assert {pair["b"] for pair in results["paired"]} == {"teacher", "untouched", "ce_only", "ce_only_same_seconds"}
    module, params = gpt2.from_hf(tmp_path / "w" / "runs" / "kd-0" / "export")
    assert module.config.width == 16
    assert loop.run(c, tmp_path / "w", quiet=True) == results


def test_unlike_tokenizers_are_refused_by_their_hash(job):
    with pytest.raises(UserError, match="found tokenizer"):
        ready(job, data=dict(test=0.4))  # other training text: as many ids, other merges
