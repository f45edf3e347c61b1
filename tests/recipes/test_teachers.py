"""The teacher's side of student_aware: several teachers as one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxdistill import UserError
from jaxdistill.data import tokenizer
from jaxdistill.losses.targets import MIXTURES
from jaxdistill.models import gpt2
from jaxdistill.recipes.lm import next_token
from jaxdistill.training import loop
from tests.invariants.checks import QUICK, values
from tests.recipes.conftest import build, config, ready, teacher
from tests.recipes.test_student_aware import OFF, ON

WEIGHTS = 0.3, 0.7


@pytest.fixture(scope="module")
def folders(job):
    """Two teachers of one tokenizer, of unlike width and depth."""
    teacher(job / "second", tokenizer.load(str(job / "teacher")), length=16, width=24, heads=4, depth=1)
    return str(job / "teacher"), str(job / "second")


class TestSeveral:
    @pytest.fixture(scope="class")
    @classmethod
    def one(cls, job, folders):
        return ready(job, teacher=dict(path=folders), kd=dict(teacher_weights=WEIGHTS))

    @pytest.fixture(scope="class")
    @classmethod
    def seen(cls, one, folders):
        """Of a batch: (logits of each teacher and of the student in float64, labels that count in evaluation, the batch)."""
        batch = next(one.built.recipe.data("train", 0))
        tokens, _, where, layout = next_token(batch)
        params = one.state.params["student"]
        sizes = gpt2.GPT2Config(vocab=len(params["wte"]["embedding"]), length=16, width=16, depth=1, heads=2)
        models = [*map(gpt2.from_hf, folders), (gpt2.GPT2(sizes), params)]
        tokens, layout = jax.tree.map(jnp.asarray, (tokens, layout))
        logits = [module.apply({"params": params}, tokens, **layout)[0] for module, params in models]
        return [np.asarray(z, np.float64) for z in logits], where, batch

    @pytest.mark.parametrize("mixture", MIXTURES)
    def test_the_target_is_their_mixture(self, job, one, folders, seen, mixture):
        logits, _, batch = seen
        *_, where, _ = next_token(batch, 0)  # (of labels only the places matter)
        built = build(job, teacher=dict(path=folders), kd=dict(teacher_weights=WEIGHTS, mixture=mixture))
        found = values(built.recipe, one, batch)["kd"]
        scaled = [z / 2 for z in logits]
        if mixture == "logits":
            p = scipy.special.softmax(WEIGHTS[0] * scaled[0] + WEIGHTS[1] * scaled[1], axis=-1)
        else:
            p = sum(w * scipy.special.softmax(z, axis=-1) for w, z in zip(WEIGHTS, scaled, strict=False))
        kl = np.sum(scipy.special.rel_entr(p, scipy.special.softmax(scaled[2], axis=-1)), axis=-1)
        assert found == pytest.approx(4 * kl[where].mean(), rel=1e-4)

    def test_evaluation_measures_against_the_mixture_too(self, one, seen):
        logits, where, batch = seen
        measure = jax.jit(one.built.recipe.evaluators["validation"].measure, compiler_options=QUICK)
        sums = measure(one.state.params, None, one.frozen, batch)
        p = sum(w * scipy.special.softmax(z, axis=-1) for w, z in zip(WEIGHTS, logits, strict=False))
        kl = np.sum(scipy.special.rel_entr(p, scipy.special.softmax(logits[2], axis=-1)), axis=-1)
        assert float(sums["kl"]) == pytest.approx(kl[where].sum(), rel=1e-4)
        assert float(sums["top1"]) == np.sum((p.argmax(-1) == logits[2].argmax(-1))[where])

    def test_each_of_them_is_part_of_the_runs_identity(self, job, folders):
        found = [build(job, teacher=dict(path=path)).recipe.facts["teacher"] for path in (folders, folders[::-1], folders[:1], folders[0])]
        assert found[0]["0"] == found[1]["1"] == found[2] == found[3]
        assert found[0]["0"]["weights"] != found[0]["1"]["weights"]

    def test_a_job_measures_each_and_teaches_by_both(self, job, folders, tmp_path):
        c = config(job)
        c.teacher.path = folders
        c.train.update(dict(steps=2, eval_every=2, checkpoint_every=2))
        c.runs = ("teacher", "kd")
        c.run = dict(teacher=dict(recipe="lm", once=True, fills="teacher.path", given="model.path", model=dict(c.student)),
                     kd=dict(recipe="student_aware", kd=dict(mixture="logits")))
        results = loop.run(c, tmp_path, quiet=True)
        assert [row["name"] for row in results["rows"]] == ["teacher_1", "teacher_2", "kd"]
        assert results["rows"][0]["bits_per_byte"] != results["rows"][1]["bits_per_byte"]
        assert results["rows"][2]["teacher_kl"] > 0


@pytest.mark.parametrize(("change", "said"), [
    (dict(kd=dict(teacher_weights=(1.0,))), "kd.teacher_weights: found (1.0,) with 2 folders in teacher.path; accepted: 2 of 0 or more "),
    (dict(kd=dict(teacher_weights=(0.7, 0.7))), "kd.teacher_weights: found (0.7, 0.7) with 2 folders in teacher.path; accepted: 2 of "),
    (dict(kd=dict(teacher_weights=(1.5, -0.5))), "kd.teacher_weights: found (1.5, -0.5) with 2 folders in teacher.path; accepted: 2 of "),
    (dict(kd=dict(teacher_weights=("a", "b"))), "kd.teacher_weights: found ('a', 'b') with 2 folders in teacher.path; accepted: 2 of "),
    (dict(kd=dict(mixture="votes")), "kd.mixture: found 'votes'; accepted: probabilities, logits"),
    (dict(kd=dict(mode="alm")), "kd.mode: found alm with 2 folders in teacher.path; accepted: logits "),
    (dict(hidden=ON), "hidden.weight: found a weight with 2 folders in teacher.path; accepted: 0 "),
    (dict(contrastive=ON, kd=OFF), "contrastive.weight: found a weight with 2 folders in teacher.path; accepted: 0 "),
    (dict(teacher=dict(path=())), "teacher.path: found (); accepted: a local folder with "),
    (dict(teacher=dict(path=("", "b"))), "teacher.path: found ('', 'b'); accepted: a local folder with "),
    (dict(teacher=dict(path=3)), "teacher.path: found 3; accepted: a local folder with "),
], ids=lambda value: value.split(":")[0] if isinstance(value, str) else "")
def test_a_bad_value_is_one_line_that_names_its_key(job, folders, change, said):
    with pytest.raises(UserError) as caught:
        build(job, **dict(teacher=dict(path=folders)) | change)
    assert str(caught.value).startswith(f"config key {said}")
    assert "\n" not in str(caught.value)


def test_each_must_count_the_same_ids(job, folders, other):
    with pytest.raises(UserError, match=f"^config key teacher.path: found tokenizer .* in {other}, and .* on the data"):
        build(job, teacher=dict(path=(folders[0], str(other))))


def test_one_in_a_tuple_is_one(job):
    """Also with its features: hidden states of one teacher can be compared."""
    built = build(job, teacher=dict(path=(str(job / "teacher"),)), kd=dict(teacher_weights=(1,)), hidden=ON)
    assert "hidden" in built.recipe.weights
