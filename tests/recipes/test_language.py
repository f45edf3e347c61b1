"""lm and student_aware: what has gone wrong silently elsewhere, each as a test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.evaluators import language
from jaxdistill.models import gpt2
from jaxdistill.recipe import Dials
from jaxdistill.recipes.lm import next_token
from jaxdistill.training import loop, plan, prepare, sharding, state
from tests.recipes.conftest import config


def ready(job, *, mesh=(1, 1, 1), recipe="student_aware", **changes):
    c = config(job)
    c.run.kd.recipe = recipe
    if recipe == "lm":
        c.model = dict(c.student)
    c.mesh = mesh
    c.update(changes)
    return prepare.prepare(prepare.build(plan.expand(c)[0]), sharding.make_mesh(mesh))


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


def test_a_student_equal_to_its_teacher_has_no_kd_left(job):
    one = ready(job, student=dict(path=str(job / "teacher")))
    total, aux = loss(one, one.state.params, device(batches(one)[0]))
    term = aux.terms["kd"]
    assert abs(float(term.sum / term.count)) < 1e-6
    gradient = jax.grad(lambda p: loss(one, p, device(batches(one)[0]), scale={"kd": 1.0, "lm": 0.0})[0])(one.state.params)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-3
    found = prepare.evaluate(one, one.state.params, {}, test=True, cache={})
    assert abs(found["test/teacher_kl"]) < 1e-6
    assert found["test/top1_agreement"] == 1.0


def test_labels_are_the_next_tokens(kd):
    """A perfect next-token student scores ~0, one that repeats the present token does not."""
    tokens, labels, where, _ = next_token(device(batches(kd)[0]))
    vocab = kd.built.recipe.facts["vocab"]
    sizes = kd.frozen["token_bytes"]
    perfect, copier = (100.0 * jax.nn.one_hot(x, vocab) for x in (labels, tokens))
    assert float(language.sums(perfect, labels, where, sizes)["nll"] / where.sum()) < 0.01
    assert float(language.sums(copier, labels, where, sizes)["nll"] / where.sum()) > 10


def test_next_token_masks_padding_and_the_seams_between_documents():
    batch = {"tokens": np.arange(1, 8)[None], "segments": np.array([[1, 1, 1, 2, 2, 0, 0]]), "positions": np.zeros((1, 7), int),
             "valid": np.array([True])}
    tokens, labels, where, _ = next_token(batch)
    np.testing.assert_array_equal(labels - tokens, np.ones((1, 6)))
    np.testing.assert_array_equal(where, [[True, True, False, True, False, False]])
    assert not next_token(batch | {"valid": np.array([False])})[2].any()


def test_padding_changes_nothing(kd):
    """More padded rows and other tokens under the padding: the same terms, and the same gradient."""
    batch = batches(kd)[0]
    padded = {name: np.concatenate([value, np.zeros_like(value)]) for name, value in batch.items()}
    padded["tokens"] = np.where(padded["segments"] > 0, padded["tokens"], 7)
    value = lambda b: lambda p: loss(kd, p, device(b), scale={"lm": 0.01, "kd": 0.01})[0]  # noqa: E731
    (a, ga), (b, gb) = (jax.value_and_grad(value(x))(kd.state.params) for x in (batch, padded))
    assert float(a) == pytest.approx(float(b), rel=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7), ga, gb)


def test_an_all_masked_batch_is_zero_with_zero_gradients(kd):
    batch = device(batches(kd)[0])
    batch["segments"] = jnp.zeros_like(batch["segments"])
    value, gradient = jax.value_and_grad(lambda p: loss(kd, p, batch)[0])(kd.state.params)
    assert float(value) == 0
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient))


def test_the_teacher_gets_no_gradient(kd):
    batch = device(batches(kd)[0])
    gradient = jax.grad(lambda t: loss(kd, kd.state.params, batch, frozen={**kd.frozen, "teacher": t})[0])(kd.frozen["teacher"])
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient))


def test_the_ledger_is_what_is_optimised(kd):
    """kd carries T^2, lm does not; weights 0.5 each; total is their sum."""
    from jaxdistill.losses.divergences import forward_kl

    batch = device(batches(kd)[0])
    tokens, labels, where, layout = next_token(batch)
    student = gpt2.GPT2(gpt2.GPT2Config(vocab=kd.built.recipe.facts["vocab"], length=16, width=16, depth=1, heads=2))
    teacher, _ = gpt2.from_hf(kd.built.run.values["teacher"]["path"])
    ours, _ = student.apply({"params": kd.state.params["student"]}, tokens, **layout)
    theirs, _ = teacher.apply({"params": kd.frozen["teacher"]}, tokens, **layout)
    total, aux = loss(kd, kd.state.params, batch, scale={"lm": 0.25, "kd": 0.125})
    wanted = 4 * jnp.sum(forward_kl(theirs, ours, temperature=2.0, where=where))
    assert float(aux.terms["kd"].sum) == pytest.approx(float(wanted), rel=1e-5)
    assert float(total) == pytest.approx(float(0.25 * aux.terms["lm"].sum + 0.125 * aux.terms["kd"].sum), rel=1e-6)


@pytest.mark.parametrize("recipe", ["lm", "student_aware"])
def test_micro_batches_equal_one_batch(job, recipe):
    """Rows of different numbers of valid tokens in every part."""
    found = []
    one = ready(job, recipe=recipe)
    batch = batches(one)[0]
    batch["segments"] = np.where(np.arange(17) < np.array([17, 2, 9, 0, 4, 17, 1, 12])[:, None], batch["segments"], 0)
    for micro in (1, 2, 4):
        gradients = jax.jit(state.make_gradients(one.built.recipe, one.groups, micro))
        weights = {name: jnp.float32(0.5) for name in one.built.recipe.weights if not one.built.recipe.weights[name].off}
        knobs = {name: jnp.float32(2.0) for name in one.built.recipe.knobs}
        grads, total, *_ = gradients(one.state.params, {}, one.frozen, device(batch), weights, knobs, jax.random.key(0))
        found.append((grads, total))
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found[0][0]))
    for grads, total in found[1:]:
        assert float(total) == pytest.approx(float(found[0][1]), rel=3e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * size), grads, found[0][0])


def test_meshes_agree_and_share_the_memory(job):
    """Parameters after three SGD updates, on every mesh; parameters and moments are cut, not copied."""
    results = {}
    for mesh in ((1, 1, 1), (8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 8, 1)):
        one = ready(job, mesh=mesh, optimizer=dict(name="sgd", momentum=0.9))
        current, losses = one.state, []
        held = jax.tree.leaves((current.params, current.opt))
        whole = sum(x.nbytes for x in held)
        here = sum(x.addressable_shards[0].data.nbytes for x in held)
        assert here <= 1.05 * whole / (mesh[1] * mesh[2])
        for batch in batches(one, 3):
            current, metrics = one.step(current, one.frozen, one.place(batch))
            losses.append(float(metrics["loss"]))
        results[mesh] = (jax.device_get(current.params), losses)
    params, losses = results.pop((1, 1, 1))
    for other, their_losses in results.values():
        np.testing.assert_allclose(their_losses, losses, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), other, params)


def test_every_parameter_is_reached_and_moves(job):
    one = ready(job)
    compiled, gates = prepare.compile_step(one, one.place(batches(one)[0]))
    assert set(gates.reach) == {frozenset({"lm", "kd"})}
    before = jax.device_get(one.state.params)
    after, metrics = compiled(one.state, one.frozen, one.place(batches(one)[0]))
    assert np.asarray(metrics["moved"]).all()
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, before, jax.device_get(after.params))))


def test_kd_at_weight_0_leaves_the_teacher_out_of_the_step(job):
    """CE-only neither runs the teacher nor pays for it, and lists kd with count 0."""
    flops = []
    for weight in (0.5, 0.0):
        one = ready(job, kd=dict(weight=((0.0, weight),), temperature=((0.0, 2.0),)))
        compiled, _ = prepare.compile_step(one, one.place(batches(one)[0]))
        flops.append(compiled.cost_analysis()["flops"])
        _, metrics = compiled(one.state, one.frozen, one.place(batches(one)[0]))
    assert flops[1] < 0.75 * flops[0]
    assert float(metrics["terms"]["kd"]["count"]) == 0
    assert float(metrics["terms"]["lm"]["weight"]) == 1


def test_bits_per_byte_by_hand():
    """Uniform over 256 ids of one byte each: 8 bits a byte; padding and uncounted tokens are left out."""
    labels, where = jnp.arange(12).reshape(2, 6), jnp.arange(6)[None] < jnp.asarray([[6], [2]])
    sums = language.sums(jnp.zeros((2, 6, 256)), labels, where, jnp.ones(256, jnp.int32), jnp.zeros((2, 6, 256)))
    found = language.finish({name: np.stack([value, value]) for name, value in sums.items()})
    assert found["bits_per_byte"] == pytest.approx(8, rel=1e-6)
    assert found["perplexity"] == pytest.approx(256, rel=1e-5)
    assert found["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert found["top1_agreement"] == found["top5_agreement"] == 1


def test_top_k_agreement_is_where_the_teachers_choice_ranks():
    student = jnp.asarray([[[5.0, 4, 3, 2, 1, 0, -1]]] * 3)
    teacher = jnp.stack([jax.nn.one_hot(jnp.asarray([i]), 7) for i in (0, 3, 6)])
    labels, where = jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1), bool)
    found = language.sums(student, labels, where, jnp.ones(7, jnp.int32), teacher)
    assert (float(found["top1"]), float(found["top5"])) == (1, 2)


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
