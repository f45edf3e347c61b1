"""On-policy distillation: the loss of a sampled batch by its definition, which updates have one, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdistill import UserError
from jaxdistill.data import tokenizer
from jaxdistill.models import gpt2
from jaxdistill.models.generation import Generated, generate
from jaxdistill.recipe import Dials, Sampler, Schedule
from jaxdistill.recipes import on_policy
from jaxdistill.training import loop, sampling
from tests.invariants.checks import EXACT, gap
from tests.recipes.conftest import build, config, ready
from tests.training.test_loop import interrupt, lines

HALF = dict(fraction=((0.0, 0.5),), prompt=4)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def one(job):
    """A run that samples, its distillation by JSD as GKD's, and a batch of text."""
    found = ready(job, on_policy=HALF, kd=dict(weight=((0.0, 0.5),), temperature=((0.0, 2.0),), kind="jsd", beta=0.3))
    return found, found.place(next(found.built.recipe.data("train", 0)))


@pytest.fixture(scope="module")
def sampled(one):
    """(the batch, what was seen of it, the key) with the first key by which a row ends before the others."""
    ready, batch = one
    draw = jax.jit(ready.built.recipe.sampler.draw)
    drawn = ((*draw(ready.state.params, {}, ready.frozen, batch, key), key) for key in map(jax.random.key, range(99)))
    return next(found for found in drawn if not found[0]["segments"].all())


def loss(ready, batch):
    weights = dict.fromkeys(ready.built.recipe.weights, jnp.ones(()))
    total, aux = jax.jit(ready.built.recipe.loss)(ready.state.params, {}, ready.frozen, batch, Dials(weights, {}), KEY)
    return float(total), aux.terms


def module_of(facts: dict) -> gpt2.GPT2:
    return gpt2.GPT2(gpt2.GPT2Config(**{name: value for name, value in facts.items() if name != "weights"}))


def test_a_sampled_batch_is_the_prompts_and_what_the_student_goes_on_with(one, sampled, job):
    ready, batch = one[0], jax.device_get(one[1])
    (drawn, seen), key = jax.device_get(sampled[:2]), sampled[2]
    module = module_of(ready.built.recipe.facts["student"])
    prompt = {name: batch[name][:, :4] for name in ("tokens", "segments", "positions")}
    eos, vocab = tokenizer.load(str(job / "teacher")).eos, ready.built.recipe.facts["vocab"]
    alone = generate(module, ready.state.params["student"], new=13, key=key, eos=eos, vocab=vocab, **prompt)
    np.testing.assert_array_equal(drawn["tokens"], np.concatenate([prompt["tokens"], alone.tokens], axis=1))
    for name, first in (("segments", prompt["segments"][:, -1:]), ("positions", prompt["positions"][:, -1:] + 1 + np.arange(13))):
        np.testing.assert_array_equal(drawn[name], np.concatenate([prompt[name], np.where(alone.mask, first, 0)], axis=1))
    assert (drawn["prompt"] == 4).all()
    assert not batch["prompt"].any()
    np.testing.assert_array_equal(drawn["valid"], batch["valid"])
    assert float(seen["log_prob"][0]) == pytest.approx(float(alone.log_probs.sum()), rel=1e-5)
    assert float(seen["length"][0]) == float(seen["log_prob"][1]) == alone.mask.sum()


def test_its_loss_is_the_divergence_of_the_sampled_tokens_alone(one, sampled):
    """GKD's loss, densely and in float64: T^2 JSD(teacher, student) at the tokens that the student wrote."""
    ready, text = one
    batch = jax.device_get(sampled[0])
    total, terms = loss(ready, batch)
    student, teacher = (module_of(ready.built.recipe.facts[name]) for name in ("student", "teacher"))
    layout = {name: batch[name][:, :-1] for name in ("segments", "positions")}

    def tempered(module, params):
        logits = jax.jit(module.apply)({"params": params}, batch["tokens"][:, :-1], **layout)[0]
        logits = np.asarray(logits, np.float64) / 2.0
        p = np.exp(logits - logits.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True)

    p, q = tempered(teacher, ready.frozen["teacher"]), tempered(student, ready.state.params["student"])
    m = 0.3 * p + 0.7 * q
    kl = lambda a, b: np.sum(a * (np.log(a) - np.log(b)), axis=-1)  # noqa: E731
    jsd = 0.3 * kl(p, m) + 0.7 * kl(q, m)
    written = (np.arange(1, 17) >= 4) & (batch["segments"][:, 1:] > 0)
    assert 0 < written.sum() < written[:, 3:].size  # some rows ended, and their padding counts nothing
    assert float(terms["kd"].sum) == pytest.approx(4.0 * jsd[written].sum(), rel=2e-5)
    assert float(terms["kd"].count) == written.sum()
    assert float(terms["lm"].count) == float(terms["lm"].sum) == 0
    assert total == pytest.approx(float(terms["kd"].sum), rel=1e-6)


def test_a_text_in_such_a_run_counts_as_in_any_other(one, job):
    ready_, batch = one
    total, terms = loss(ready_, batch)
    plain = ready(job, kd=dict(weight=((0.0, 0.5),), temperature=((0.0, 2.0),), kind="jsd", beta=0.3))
    expected, others = loss(plain, {name: value for name, value in batch.items() if name != "prompt"})
    assert total == pytest.approx(expected, rel=1e-6)
    assert {name: float(term.count) for name, term in terms.items()} == {name: float(term.count) for name, term in others.items()}


def test_a_fraction_of_0_is_the_offline_program(job):
    """GKD's lambda of 0: not a bit differs, as nothing of it is there."""

    def program(**changes):
        one = ready(job, dry=True, **changes)
        assert one.built.recipe.sampler is None
        return one.step.lower(one.abstract, one.frozen, next(one.built.recipe.data("train", 0))).as_text()

    assert program(on_policy=dict(fraction=((0.0, 0.0),), prompt=99)) == program()


def test_a_run_without_kd_has_no_use_for_samples(job):
    assert build(job, on_policy=HALF, kd=dict(weight=((0.0, 0.0),))).recipe.sampler is None


def test_nothing_is_sampled_while_kd_is_closed(job):
    sampler = build(job, on_policy=HALF, kd=dict(weight=((0.5, 0.0), (1.0, 0.9)))).recipe.sampler
    steps = config(job).train.steps
    assert float(sampler.fraction(0.25 * steps)) == 0
    assert float(sampler.fraction(steps)) == 0.5


def test_which_updates_are_sampled():
    steps, key = 20_000, jax.random.key(0)
    pick = lambda *knots, key=key, steps=steps: np.asarray(sampling.chosen(Sampler(Schedule(knots), None), key, steps))  # noqa: E731
    found = pick((0.0, 0.3))
    assert abs(found.mean() - 0.3) < 5 * np.sqrt(0.21 / steps)
    np.testing.assert_array_equal(found[:500], pick((0.0, 0.3), steps=500))  # of the key and the number alone
    assert 0.3 < (found == pick((0.0, 0.3), key=jax.random.key(1))).mean() < 0.7
    assert pick((0.0, 1.0)).all()
    rising = pick((5_000.0, 0.0), (15_000.0, 1.0))
    assert not rising[:5_000].any() and rising[15_000:].all()  # noqa: PT018
    assert abs(rising[5_000:15_000].mean() - 0.5) < 0.03


class TestARun:
    @pytest.fixture
    def sampling(self, job):
        c = config(job)
        c.on_policy = ConfigDict(HALF)
        return c

    def test_resumed_it_is_the_uninterrupted_one(self, sampling, tmp_path, monkeypatch):
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        loop.run(sampling, whole, quiet=True)
        with monkeypatch.context() as patch:
            interrupt(patch, at=5)
            with pytest.raises(loop.Interrupted):
                loop.run(sampling, broken, quiet=True)
        loop.run(sampling, broken, quiet=True)
        found, expected = (lines(folder / "runs" / "kd-0") for folder in (broken, whole))
        assert found == expected
        exported = [(folder / "runs" / "kd-0" / "export" / "model.safetensors").read_bytes() for folder in (broken, whole)]
        assert exported[0] == exported[1]
        updates = [line for line in expected if "loss" in line]
        told = [line["sampled"] for line in updates]
        assert {True, False} == set(told[:5]) == set(told[5:])  # on both sides of the break
        for line in updates:
            assert ("samples" in line) == line["sampled"] == (line["terms"]["lm"]["count"] == 0)
            assert line["terms"]["kd"]["count"] > 0
            assert line["sampled"] != bool(line["probes"])
        samples = next(line["samples"] for line in updates if line["sampled"])
        assert samples["teacher_entropy"] > 0
        assert 1 < samples["length"] <= 13
        assert -8 < samples["log_prob"] < -3
        assert 0 <= samples["repetition"] < 0.5

    def test_the_samples_are_the_same_on_eight_devices_and_placed_as_a_batch_is(self, job):
        found = []
        for mesh in ((1, 1, 1), (2, 2, 2)):
            one = ready(job, mesh=mesh, on_policy=dict(fraction=((0.0, 1.0),), prompt=4), train=dict(micro=2))
            text = one.place(next(one.built.recipe.data("train", 0)))
            batch, drawn = sampling.Sampling(one, one.state).replace(3, one.state, text)
            assert jax.tree.map(lambda x: x.sharding, batch) == jax.tree.map(lambda x: x.sharding, text)
            found.append(jax.device_get((batch, drawn)))
        (batch, drawn), (other, drawn_too) = found
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])
        np.testing.assert_allclose(*(np.asarray(jax.tree.leaves(seen)) for seen in (drawn, drawn_too)), rtol=1e-5)


def updated(job, mesh=(1, 1, 1), micro=1):
    """(the parameters after an update whose batch the student wrote, with rows that end early; its terms; the batch; the parameters
    before). By SGD and at a large rate: Adam would divide rounding noise by itself."""
    one = ready(
        job, mesh=mesh, on_policy=dict(fraction=((0.0, 1.0),), prompt=4), train=dict(micro=micro, lr=1.0, warmup=0.0),
        kd=dict(weight=((0.0, 0.5),), temperature=((0.0, 2.0),)), hidden=dict(weight=((0.0, 0.3),)),
        optimizer=dict(name="sgd", momentum=0.0, clip=0.0),
    )
    draw, text = sampling.Sampling(one, one.state), one.place(next(one.built.recipe.data("train", 0)))
    drawn = (draw.replace(at, one.state, text)[0] for at in range(8))
    batch = next(batch for batch in drawn if not np.asarray(batch["segments"]).all())
    before = jax.device_get(one.state.params)
    after, metrics = one.step(one.state, one.frozen, batch)
    return jax.device_get((after.params, metrics["terms"], batch, before))


@pytest.fixture(scope="module")
def alone(job):
    found = updated(job)
    counts = (found[2]["segments"][:, 4:] > 0).sum(axis=1)
    assert len({counts[part::4].sum() for part in range(4)}) > 1  # of the micro-batches
    assert gap(found[0], found[3]) > 0.01
    return found


@pytest.mark.parametrize(("options", "within"), [
    (dict(micro=2), EXACT), (dict(micro=4), EXACT), (dict(mesh=(8, 1, 1)), 1e-5), (dict(mesh=(2, 4, 1)), 1e-5)], ids=str)
def test_an_update_is_the_same_in_micro_batches_and_on_a_mesh(job, alone, options, within):
    (params, terms, batch, _), (wanted, lines, written, _) = updated(job, **options), alone
    for name in ("tokens", "segments", "prompt"):
        np.testing.assert_array_equal(batch[name], written[name])
    for name, line in lines.items():
        assert terms[name]["count"] == line["count"], name
        assert terms[name]["raw"] == pytest.approx(line["raw"], rel=1e-5), name
    for part in wanted:
        assert gap(params[part], wanted[part]) < within, part


def test_repetition_is_the_share_of_ngrams_that_were_there_before():
    rows = [[1, 2, 3, 4, 1, 2, 3, 4, 5], [7] * 9, [1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 0, 0, 0, 0, 5, 5, 5, 5], [1, 2, 3, 0, 0, 0, 0, 0, 0]]
    sizes = [9, 9, 9, 6, 3]
    expected = []
    for row, size in zip(rows, sizes, strict=True):
        grams = [tuple(row[i : i + 4]) for i in range(size - 3)]
        expected += [1 - len(set(grams)) / len(grams)] if grams else []
    mask = jnp.arange(9)[None] < jnp.asarray(sizes)[:, None]
    total, count = on_policy.seen(Generated(jnp.asarray(rows), mask, jnp.zeros(mask.shape)))["repetition"]
    assert (float(total), float(count)) == (pytest.approx(sum(expected)), len(expected))


@pytest.mark.parametrize(("change", "said"), [
    (dict(fraction=((0.0, 1.5),)), "on_policy.fraction: found ((0.0, 1.5),); accepted: values from 0 to 1"),
    (dict(fraction=0.5), "on_policy.fraction: found 0.5; accepted: ((fraction, value), ...)"),
    (dict(prompt=17), "on_policy.prompt: found 17; accepted: from 1 to data.length (16)"),
    (dict(prompt=0), "on_policy.prompt: found 0; accepted: from 1"),
    (dict(temperature=-0.1), "on_policy.temperature: found -0.1; accepted: 0"),
    (dict(top_p=0.0), "on_policy.top_p: found 0.0; accepted: above 0"),
    (dict(lmbda=0.5), "on_policy.lmbda: found in on_policy, which has no such key; accepted: fraction, prompt"),
])
def test_a_bad_value_is_one_line_that_names_its_key(job, change, said):
    with pytest.raises(UserError) as caught:
        build(job, on_policy=HALF | change)
    assert str(caught.value).startswith(f"config key {said}")
    assert "\n" not in str(caught.value)


def test_a_teacher_of_another_tokenizer_cannot_read_samples(job, other):
    with pytest.raises(UserError, match=r"^config key on_policy\.fraction: found .* with kd\.mode 'alm'; accepted: "):
        build(job, teacher=dict(path=str(other)), kd=dict(mode="alm"), on_policy=HALF)
