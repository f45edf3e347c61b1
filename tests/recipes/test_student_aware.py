"""student_aware: each term trains, each mode runs, and what cannot be done is one line. (What holds of any recipe: tests/invariants.)"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from safetensors import safe_open

from jaxdistill import UserError
from jaxdistill.data import tokenizer
from jaxdistill.models import gpt2
from jaxdistill.recipe import Variables
from jaxdistill.training import loop, optim, plan
from jaxdistill.training.metrics import record
from tests.invariants.checks import QUICK, values
from tests.recipes.conftest import build, config, ready
from tests.training.test_loop import interrupt

ON = dict(weight=((0.0, 1.0),))
OFF = dict(weight=((0.0, 0.0),))
MATRICES = ("kernel", "embedding")


def train(one, updates: int) -> list[dict]:
    """Lines of the first updates."""
    data, now, lines = one.built.recipe.data("train", 0), one.state, []
    batch = one.place(next(data))
    step = one.step.lower(now, one.frozen, batch).compile(compiler_options=QUICK)
    for number in range(1, updates + 1):
        now, metrics = step(now, one.frozen, batch)
        lines.append(record(number, metrics))
        batch = one.place(next(data))
    return lines


def fell(lines: list[dict], term: str) -> float:
    """The last five updates' share of the first one's value."""
    return float(np.mean([line["terms"][term]["raw"] for line in lines[-5:]])) / lines[0]["terms"][term]["raw"]


class TestTerms:
    @pytest.fixture(scope="class")
    @classmethod
    def lines(cls, job):
        """One run with everything on: a student of other depth and heads than the teacher's."""
        router = dict(k=((0.0, 1.0), (1.0, 2.0)), temperature=((0.0, 1.0), (1.0, 0.1)))
        one = ready(
            job, student=dict(depth=3, heads=4), train=dict(steps=60, lr=1e-2), kd=dict(temperature=((0.0, 2.0), (1.0, 1.5))),
            hidden=ON, attention=ON, contrastive=ON, router=ON | router,
        )
        return train(one, 60)

    @pytest.mark.parametrize(("term", "to"), [("hidden", 0.7), ("attention", 0.95), ("router", 0.7), ("contrastive", 0.9)])
    def test_it_falls_when_it_is_on(self, lines, term, to):
        assert fell(lines, term) < to

    def test_knobs_and_routing_are_logged(self, lines):
        first, last = lines[0], lines[-1]
        assert (first["knobs"]["router_k"], first["knobs"]["router_temperature"], first["knobs"]["temperature"]) == (1, 1, 2)
        assert last["knobs"]["router_k"] == pytest.approx(1 + 59 / 60, rel=1e-5)
        assert last["knobs"]["router_temperature"] == pytest.approx(1 - 0.9 * 59 / 60, rel=1e-4)
        assert last["knobs"]["temperature"] == pytest.approx(2 - 0.5 * 59 / 60, rel=1e-5)
        for line in lines:
            probes = line["probes"]
            assert 0 <= probes["router/entropy"] <= np.log(2) + 1e-5
            assert probes["router/load_0"] + probes["router/load_1"] == pytest.approx(1, rel=1e-5)
            assert probes["router/target_variance"] > 0
            assert 0 < probes["hidden/layer_entropy"] <= np.log(3) + 1e-5
            assert 0 < probes["attention/head_entropy"] <= np.log(2) + 1e-5

    def test_a_student_of_one_block_is_not_called_sick(self, job, tmp_path):
        """One layer has no layer weights to learn, which is no reason for the gate of dead parameters to stop the run."""
        c = config(job)
        c.update(dict(hidden=ON, kd=OFF, train=dict(steps=12, eval_every=12, checkpoint_every=12)))
        assert loop.run(c, tmp_path, quiet=True)["rows"][0]["stop"] == ""

    def test_a_llama_learns_from_a_gpt2(self, job):
        student = dict(family="llama", depth=1, heads=4, kv_heads=2)
        kd = dict(weight=((0.0, 0.95),))  # (the teacher knows nothing of the text: half of lm would pull away from it)
        lines = train(ready(job, student=student, kd=kd, train=dict(steps=40), hidden=ON, attention=ON), 40)
        assert fell(lines, "hidden") < 0.8
        assert fell(lines, "attention") < 1
        assert fell(lines, "kd") < 0.9


def test_a_bfloat16_teacher_is_held_in_bfloat16_and_teaches_the_same_bits(job):
    one = ready(job, teacher=dict(dtype="bfloat16"), hidden=ON, attention=ON)
    whole = jax.tree.map(lambda x: x.astype("float32") if x.dtype == "bfloat16" else x, one.frozen)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(one.frozen["teacher"]["block_0"]))
    assert held < 0.6 * sum(leaf.nbytes for leaf in jax.tree.leaves(whole["teacher"]["block_0"]))
    batch = one.place(next(one.built.recipe.data("train", 0)))
    step = jax.jit(one.step.__wrapped__, compiler_options=QUICK)  # as it is, it takes the state away
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(step(one.state, frozen, batch)[1]) for frozen in (one.frozen, whole)))


def test_the_contrast_by_hand_at_the_temperature_of_the_config(job):
    ours, theirs = np.random.default_rng(0).normal(size=(2, 8, 16))
    recipe = ready(job, dry=True, contrastive=dict(ON, temperature=0.5)).built.recipe
    stats = {"student_pool": jnp.asarray(ours), "teacher_pool": jnp.asarray(theirs), "tokens": jnp.ones(8)}
    terms, _ = recipe.whole({}, {}, stats, {})
    cosines = (ours / np.linalg.norm(ours, axis=1, keepdims=True)) @ (theirs / np.linalg.norm(theirs, axis=1, keepdims=True)).T
    wanted = scipy.special.logsumexp(cosines / 0.5, axis=1) - np.diag(cosines) / 0.5
    assert float(terms["contrastive"].sum) == pytest.approx(wanted.sum(), rel=1e-5)


class TestParameters:
    def test_groups(self, job):
        one = ready(job, dry=True, kd=dict(mode="projector"), hidden=dict(ON, projector="mlp"), router=ON, student=dict(depth=2))
        rows = {row["group"]: row for row in optim.table(one.abstract.params, one.groups)}
        wanted = {"student": 1, "projector": 5, "router": 2, "match": 1}
        assert {name: row["lr_mult"] for name, row in rows.items()} == wanted | {f"{name}_no_decay": mult for name, mult in wanted.items()}
        assert {name for name, row in rows.items() if row["weight_decay"]} == set(wanted)
        for (path, leaf), group in zip(jax.tree.leaves_with_path(one.abstract.params), jax.tree.leaves(one.groups), strict=True):
            name = optim.path_name(path)
            assert group.name.removesuffix("_no_decay") == ("router" if name.startswith("match/router") else name.split("/")[0]), name
            if group.weight_decay:
                assert leaf.ndim == 2, name
                assert name.endswith(MATRICES), name
            elif name.endswith("kernel"):
                pytest.fail(f"{name} has no decay")

    def test_without_a_term_nothing_stands_between_the_models(self, job):
        assert set(ready(job, kd=OFF, dry=True).abstract.params) == {"student"}

    def test_the_export_is_the_student_alone(self, job, tmp_path):
        one = ready(job, kd=dict(mode="projector"), hidden=ON, student=dict(depth=2))
        assert set(one.state.params) == {"student", "match", "projector"}
        one.built.recipe.export(jax.device_get(one.state.params), tmp_path / "export")
        names = []
        for folder in (tmp_path / "export", job / "teacher"):
            with safe_open(folder / "model.safetensors", "np") as file:
                names.append(set(file.keys()))
        assert names[0] == names[1]
        module, params = gpt2.from_hf(tmp_path / "export")
        assert (module.config.width, module.config.depth) == (16, 2)
        jax.tree.map(np.testing.assert_array_equal, params, one.state.params["student"])


class TestCalibration:
    """The teacher's own weights as the student: the best projection changes nothing, and then there is nothing to distil."""

    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, job):
        """Of each initialisation: (kd at the first update, projector_nll, nll) of a student that is its teacher."""
        found, cache = {}, {}
        for init in ("orthogonal", "lstsq", "heads"):
            one = ready(job, student=dict(path=str(job / "teacher")), kd=dict(mode="projector"), projector=dict(init=init, ridge=1e-6))
            recipe = one.built.recipe
            assert (recipe.calibrate is None) == (init == "orthogonal")
            variables = Variables(one.state.params)
            if recipe.calibrate:
                variables = recipe.calibrate(variables, one.frozen, recipe.data("train", 0))
            first = cache.setdefault("recipe", recipe)  # the same program for all three
            cache.setdefault("measure", jax.jit(first.evaluators["validation"].measure, compiler_options=QUICK))
            batch = next(recipe.data("validation", 0))
            sums = cache["measure"](variables.params, variables, one.frozen, batch)
            kd = values(first, one, batch, params=variables.params)["kd"]
            found[init] = (kd, float(sums["projector_nll"] / sums["projector_tokens"]), float(sums["nll"] / sums["tokens"]))
        return found

    @pytest.mark.parametrize("init", ["lstsq", "heads"])
    def test_a_fitted_projector_speaks_the_students_language_at_once(self, found, init):
        kd, projected, nll = found[init]
        assert kd < 1e-2
        assert projected == pytest.approx(nll, rel=1e-2)
        assert kd < 0.1 * found["orthogonal"][0]
        assert abs(projected - nll) < 0.1 * abs(found["orthogonal"][1] - nll)


@pytest.mark.parametrize(("change", "said"), [
    (dict(kd=dict(mode="logit")), "kd.mode: found 'logit'; accepted: logits, projector, alm, uld"),
    (dict(kd=dict(kind="kl")), "kd.kind: found 'kl'; accepted: forward_kl, "),
    (dict(kd=dict(beta=1.5)), "kd.beta: found 1.5; accepted: values from 0 to 1"),
    (dict(kd=dict(alpha=-0.1)), "kd.alpha: found -0.1; accepted: values from 0 to 1"),
    (dict(kd=dict(top_k=0)), "kd.top_k: found 0; accepted: 1 or more"),
    (dict(kd=dict(tau=0.0)), "kd.tau: found 0.0; accepted: a number above 0"),
    (dict(kd=dict(temperature=((0.0, 0.0),))), "kd.temperature: found ((0.0, 0.0),); accepted: "),
    (dict(kd=dict(mode="projector"), projector=dict(kind="mlp")), "projector.init: found 'lstsq' with projector.kind 'mlp'; accepted: "),
    (dict(projector=dict(kind="cubic")), "projector.kind: found 'cubic'; accepted: linear, mlp"),
    (dict(projector=dict(init="zeros")), "projector.init: found 'zeros'; accepted: "),
    (dict(kd=dict(mode="projector"), projector=dict(weight=0.0)), "projector.weight: found 0.0; accepted: a number above 0"),
    (dict(projector=dict(ridge=0.0)), "projector.ridge: found 0.0; accepted: a number above 0"),
    (dict(projector=dict(calibration=0)), "projector.calibration: found 0; accepted: 1 or more"),
    (dict(hidden=dict(distance="l1")), "hidden.distance: found 'l1'; accepted: rms, cosine"),
    (dict(hidden=dict(projector="deep")), "hidden.projector: found 'deep'; accepted: linear, mlp"),
    (dict(hidden=dict(balance=0.0)), "hidden.balance: found 0.0; accepted: a number above 0"),
    (dict(hidden=dict(weight=((0.0, -0.1),))), "hidden.weight: found ((0.0, -0.1),); accepted: "),
    (dict(contrastive=dict(temperature=0.0)), "contrastive.temperature: found 0.0; accepted: a number above 0"),
    (dict(contrastive=ON, train=dict(batch=4)), "train.batch: found 4 with a contrastive term; accepted: 8 examples or more"),
    (dict(router=dict(ON, k=((0.0, 0.5),))), "router.k: found ((0.0, 0.5),); accepted: values from 1"),
    (dict(router=dict(ON, temperature=((0.0, 0.0),))), "router.temperature: found ((0.0, 0.0),); accepted: "),
    (dict(router=dict(lr_mult=0.0)), "router.lr_mult: found 0.0; accepted: a number above 0"),
    (dict(router=dict(hops=2)), "router.hops: found in router, which has no such key; accepted: weight, "),
    (dict(react=dict(patience=-1)), "react.patience: found -1; accepted: 0 (never) or more"),
    (dict(react=dict(balance="hidden")), "react.balance: found 'hidden'; accepted: '' or one of lm, kd"),
], ids=lambda value: value.split(":")[0] if isinstance(value, str) else "")
def test_a_bad_value_is_one_line_that_names_its_key(job, change, said):
    with pytest.raises(UserError) as caught:
        build(job, **change)
    assert str(caught.value).startswith(f"config key {said}")
    assert "\n" not in str(caught.value)


INERT = [
    (dict(kd=dict(mode="uld", kind="jsd")), "kd.kind: found 'jsd'; accepted: 'forward_kl' with kd.mode 'uld'"),
    (dict(kd=dict(mode="alm", temperature=((0.0, 4.0),))), "kd.temperature: found ((0.0, 4.0),); accepted: ((0.0, 1.0),) with kd.mode"),
    (dict(kd=dict(beta=0.9)), "kd.beta: found 0.9; accepted: 0.5 with kd.kind 'forward_kl', which does not use it ('jsd' does)"),
    (dict(kd=dict(kind="jsd", alpha=0.9)), "kd.alpha: found 0.9; accepted: 0.1 with kd.kind 'jsd'"),
    (dict(kd=dict(top_k=3)), "kd.top_k: found 3; accepted: 64 with kd.kind 'forward_kl'"),
    (dict(kd=dict(tau=5.0)), "kd.tau: found 5.0; accepted: 100.0 with kd.mode 'logits', which does not use it ('alm' does)"),
    (dict(kd=dict(mixture="logits")), "kd.mixture: found 'logits'; accepted: 'probabilities' with one teacher, which does not use it"),
    (dict(projector=dict(init="normal")), "projector.init: found 'normal'; accepted: 'lstsq' with kd.mode 'logits'"),
    (dict(projector=dict(lr_mult=9.0)), "projector.lr_mult: found 9.0; accepted: 5.0 with kd.mode 'logits'"),
    (dict(on_policy=dict(prompt=3)), "on_policy.prompt: found 3; accepted: 32 with on_policy.fraction ((0.0, 0.0),)"),
]


class TestInertOptions:
    """What no run of a job uses has no other value than the default."""

    @pytest.fixture
    def inert(self, job):
        c = config(job)
        c.kd.temperature = ((0.0, 1.0),)
        return c

    @pytest.mark.parametrize(("change", "said"), INERT, ids=[said.split(":")[0] for _, said in INERT])
    def test_it_is_one_line_that_names_what_uses_it(self, inert, change, said, tmp_path):
        inert.update(change)
        with pytest.raises(UserError) as caught:
            loop.check(inert, tmp_path)
        assert str(caught.value).startswith(f"config key {said}")
        assert "\n" not in str(caught.value)

    def test_one_run_that_uses_it_is_enough_and_a_term_that_is_off_is_no_reason(self, inert, tmp_path):
        inert.update(dict(kd=dict(kind="jsd", beta=0.9, tau=5.0), on_policy=dict(prompt=4)))
        inert.run = dict(
            ce_only=dict(recipe="student_aware", kd=OFF), alm=dict(recipe="student_aware", kd=dict(mode="alm")),
            gkd=dict(recipe="student_aware", on_policy=dict(fraction=((0.0, 0.5),))),
        )
        inert.runs, inert.headline = ("ce_only", "alm", "gkd"), ""
        built = {one.run.name: one for one in loop.check(inert, tmp_path)}
        read = lambda name: plan.identity(built[name].run, {})["config"].keys() & {"kd.beta", "kd.kind", "kd.tau"}  # noqa: E731
        assert {name: read(name) for name in built} == {
            "ce_only": {"kd.beta", "kd.kind"}, "alm": {"kd.tau"}, "gkd": {"kd.beta", "kd.kind"}}


class TestOtherTokenizer:
    """A teacher of fewer ids, learned from other text, wider and with more heads."""

    @pytest.mark.parametrize(("change", "said"), [
        (dict(kd=dict(mode="alm"), attention=ON), "config key attention.weight: found a weight with a teacher of another tokenizer"),
        (dict(kd=dict(mode="logits")), "config key teacher.path: found tokenizer "),
    ])
    def test_what_it_cannot_do_is_one_line(self, job, other, change, said):
        with pytest.raises(UserError) as caught:
            build(job, teacher=dict(path=str(other)), **change)
        assert str(caught.value).startswith(said)
        assert "\n" not in str(caught.value)

    def test_the_insides_are_compared_at_aligned_places_only(self, job, other):
        features = dict(hidden=ON, router=ON, contrastive=ON)
        one = ready(job, teacher=dict(path=str(other)), kd=dict(OFF, mode="alm"), student=dict(depth=2), **features)
        lines = train(one, 40)
        line, labels = lines[0], 8 * 16
        assert 0 < line["terms"]["hidden"]["count"] < labels
        assert line["terms"]["hidden"]["count"] == line["terms"]["router"]["count"] < line["terms"]["lm"]["count"]
        for term in ("hidden", "router", "contrastive"):
            assert fell(lines, term) < 1

    def test_a_job_of_all_three_ways(self, job, other, tmp_path):
        c = config(job)
        c.teacher.path = str(other)
        c.train.update(dict(steps=4, eval_every=2, checkpoint_every=4))
        c.runs, c.headline = ("projector", "alm", "uld"), "projector"
        c.run = {mode: dict(recipe="student_aware", kd=dict(mode=mode)) for mode in c.runs}
        rows = {row["name"]: row for row in loop.run(c, tmp_path, quiet=True)["rows"]}
        assert list(rows) == ["projector", "alm", "uld"]
        assert all(0 < row["bits_per_byte"] < 20 for row in rows.values())
        assert rows["projector"]["validation"]["validation/projector_nll"] > 0
        for mode in rows:
            module, _ = gpt2.from_hf(tmp_path / "runs" / f"{mode}-0" / "export")
            assert module.config.width == 16


class TestPaddedHeads:
    """Rows of a head after the last id are padding: they take no probability, and no tokens share them."""

    @pytest.fixture(scope="class")
    @classmethod
    def padded(cls, job, other, tmp_path_factory):
        """(folder) -> its model with 20 rows more, which any state finds likely."""

        def make(folder):
            module, params = gpt2.from_hf(folder)
            wte, grown = params["wte"]["embedding"], tmp_path_factory.mktemp("padded")
            more = 3 * np.random.default_rng(0).normal(size=(20, wte.shape[1])).astype(np.float32)
            module = module.clone(config=dataclasses.replace(module.config, vocab=len(wte) + len(more)))
            tok = tokenizer.load(str(folder))
            params = params | {"wte": {"embedding": jnp.concatenate([wte, more])}}
            gpt2.to_hf(module, params, grown, bos_token_id=tok.eos, eos_token_id=tok.eos)
            tokenizer.save(tok, str(grown))
            return grown

        return {folder.name: make(folder) for folder in (job / "teacher", other)}

    @pytest.mark.parametrize("mode", ["alm", "uld"])
    def test_they_take_no_probability(self, job, other, padded, mode):
        found = []
        for student, teacher in ((job / "teacher", other), (padded["teacher"], padded["other"])):
            one = ready(job, student=dict(path=str(student)), teacher=dict(path=str(teacher)), kd=dict(mode=mode))
            found.append(values(one.built.recipe, one, next(one.built.recipe.data("train", 0))))
        assert found[1] == pytest.approx(found[0], rel=1e-5)

    def test_the_map_between_two_heads_is_of_the_ids_alone(self, job, padded):
        found = []
        for student in (job / "teacher", padded["teacher"]):
            one = ready(job, student=dict(path=str(student)), kd=dict(mode="projector"), projector=dict(init="heads"))
            found.append(one.built.recipe.calibrate(Variables(one.state.params), one.frozen, None).params["projector"])
        jax.tree.map(np.testing.assert_array_equal, *found)


class TestStopping:
    """At a rate of 0 no evaluation is better than the first."""

    @pytest.fixture
    def stopping(self, job):
        c = config(job)
        c.update(dict(kd=OFF, react=dict(patience=2), train=dict(steps=20, lr=0.0, eval_every=2, checkpoint_every=1)))
        return c

    def test_after_two_evaluations_without_a_better_one(self, stopping, tmp_path):
        row = loop.run(stopping, tmp_path, quiet=True)["rows"][0]
        assert row["steps"] == 6
        assert row["stop"].startswith("validation/bits_per_byte has not fallen below ")
        assert row["stop"].endswith("for 2 evaluations")

    def test_what_it_waited_for_is_in_the_checkpoint(self, stopping, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            interrupt(patch, at=5)
            with pytest.raises(loop.Interrupted):
                loop.run(stopping, tmp_path, quiet=True)
        assert loop.run(stopping, tmp_path, quiet=True)["rows"][0]["steps"] == 6
