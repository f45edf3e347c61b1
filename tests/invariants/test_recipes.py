"""Every check, of every shipped recipe and of one from outside the package."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.data import text, tokenizer
from jaxdistill.evaluators import language
from jaxdistill.losses import cross_tokenizer, fused_vocab
from jaxdistill.models import gpt2
from jaxdistill.recipe import Variables
from jaxdistill.recipes import lm, student_aware
from tests import jobs, toy
from tests.invariants import cases, checks
from tests.invariants.cases import Language
from tests.invariants.checks import EXACT, QUICK, Case, Invariants, gap, measure, same, values, weights_of, whole_run
from tests.recipes import conftest


class TestToy(Invariants):
    """Ragged masks, a term of the whole batch, a frozen leaf. Its `kd` and `contrast` count padding on purpose."""

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls):
        def ready(mesh=(1, 1, 1)):
            config = jobs.toy(kd=((0.0, 0.0), (0.5, 0.7)))
            config.mesh = mesh
            config.optimizer.update(dict(name="sgd", clip=0.0))
            return jobs.ready(config)

        def padded(batch):
            more = {name: np.concatenate([value, value]) for name, value in batch.items()}
            more["where"][len(batch["where"]):] = False
            return more | {"y": np.where(more["where"], more["y"], 9.0).astype(np.float32)}

        one, rows = ready(), toy.rows(0)
        order = np.argsort(rows["where"].sum(1))[:16]
        return Case(
            one, {name: value[order] for name, value in rows.items()}, remade=ready, padded=padded,
            masked=lambda batch: batch | {"where": np.zeros_like(batch["where"])},
            taught=lambda: (one, jax.tree.map(jnp.copy, one.frozen["teacher"])), zero=("kd",), maskable=("fit",), looks=(),
        )


class Chunked(Language):
    def test_the_size_of_a_chunk_changes_nothing(self, case, monkeypatch):
        """24 tokens: three positions of the eight rows, which do not divide the 16."""
        fused = functools.partial(fused_vocab.fused_vocab_loss, chunk=24)
        for module in (lm, student_aware):
            monkeypatch.setattr(module, "fused_vocab_loss", fused)
        for name in ("token_log_probs", "chunked_uld"):
            monkeypatch.setattr(cross_tokenizer, name, functools.partial(getattr(cross_tokenizer, name), chunk=24))
        same(measure(dataclasses.replace(case, programs={})), measure(case), EXACT)


class TestLM(Chunked):
    name = "lm"

    def test_evaluation_looks_at_the_next_token_too(self, case):
        measured = jax.jit(case.recipe.evaluators["validation"].measure, compiler_options=QUICK)
        perfect, copier = (cases.speller(case, copies=copies) for copies in (False, True))
        found = [measured(p, Variables(p), case.ready.frozen, cases.spelled(case)) for p in (perfect, copier)]
        nll = [float(sums["nll"] / sums["tokens"]) for sums in found]
        assert nll[0] < 1e-3
        assert nll[1] > 100


class TestLogits(Chunked):
    name = "logits"

    @pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)], ids=str)
    def test_meshes_agree(self, case, mesh):
        checks.meshes_agree(case, mesh)

    def test_the_gradient_of_kd_keeps_its_size_at_any_temperature(self, case):
        """Without T^2 it would be 16 times smaller at the second."""
        low, high = (optax.tree.norm(measure(case, weights={"kd": 1.0}, knobs={"temperature": t}).grads) for t in (8.0, 32.0))
        assert 0.5 < high / low < 2

    def test_beta_0_is_forward_and_beta_1_is_reverse(self, case, job):
        """Which of the two it is matters: they differ."""
        sharp = {"temperature": 0.1}  # near to even distributions the two are alike

        def other(**kd):
            recipe = conftest.build(job, kd=cases.RAMPS["kd"] | kd).recipe
            return values(recipe, case.ready, case.batch, knobs=sharp)["kd"]

        forward, reverse = values(case.recipe, case.ready, case.batch, knobs=sharp)["kd"], other(kind="reverse_kl")
        assert abs(forward / reverse - 1) > 0.02
        assert other(kind="jsd", beta=0.0) == pytest.approx(forward, rel=1e-5)
        assert other(kind="jsd", beta=1.0) == pytest.approx(reverse, rel=1e-5)

    def test_rows_of_the_head_beyond_the_tokenizers_ids_are_nobody(self, case, job, tmp_path):
        """Both heads padded, with rows that would win every softmax: the same values and gradients, and none to these rows."""
        tok, sizes = tokenizer.load(str(job / "teacher")), {}
        for name, depth in (("student", 1), ("teacher", 2)):
            sizes[name] = gpt2.GPT2(gpt2.GPT2Config(vocab=tok.vocab + 5, length=16, width=16, depth=depth, heads=2))
            params = case.ready.state.params["student"] if name == "student" else case.ready.frozen["teacher"]
            rows = jnp.concatenate([params["wte"]["embedding"], jnp.full((5, 16), 5.0)])
            gpt2.to_hf(sizes[name], params | {"wte": {"embedding": rows}}, tmp_path / name, bos_token_id=tok.eos, eos_token_id=tok.eos)
            tokenizer.save(tok, str(tmp_path / name))
        paths = {name: dict(path=str(tmp_path / name)) for name in sizes}
        wider = dataclasses.replace(case, ready=cases.ready(job, kd=cases.RAMPS["kd"], **paths), programs={})
        found, plain = measure(wider), measure(case)
        assert found.raw == pytest.approx(plain.raw, rel=1e-5)
        rows = found.grads["student"]["wte"]["embedding"]
        assert not rows[tok.vocab:].any()
        assert gap(rows[: tok.vocab], plain.grads["student"]["wte"]["embedding"]) < 1e-5


class TestProjector(Chunked):
    """A teacher of another tokenizer, read through the student's head."""

    name = "projector"

    def test_the_target_does_not_move_to_meet_the_student(self, case):
        found = measure(case, weights={"kd": 1.0})
        assert found.reached("projector") == set()
        assert found.reached("student")

    def test_the_anchor_moves_the_projector_alone(self, case):
        found = measure(case, weights={"anchor": 1.0})
        assert found.reached("student") == set()
        assert found.reached("projector") == {"projector/out/kernel", "projector/out/bias"}

    def test_kd_is_closed_until_the_projected_teacher_beats_the_unigrams(self, case, job, other):
        lines = [metrics["terms"] for metrics in whole_run(case).metrics]
        assert {(float(line["lm"]["weight"]), float(line["kd"]["weight"])) for line in lines} == {(1.0, 0.0)}
        corpus, recipe = text.paired(text.TextConfig(**conftest.TEXT | dict(path=str(job / "text"))), str(other), 40), case.recipe
        labels = {}
        for split, rows in corpus.splits.items():  # of the places that are measured: where both models have read the same
            found = rows.rows(np.arange(len(rows)))
            there = (found["segments"][:, 1:] == found["segments"][:, :-1]) & (found["segments"][:, 1:] > 0)
            there &= (found["aligned"][:, :-1] >= 0) & (found["aligned"][:, :-1] < rows.width)
            labels[split] = found["tokens"][:, 1:][there]
        assert len(labels["validation"]) < corpus.splits["validation"].packed.predicted
        unigrams = language.unigram_nll(labels["train"], labels["validation"], corpus.vocab)
        memory, seen = recipe.memory, []
        for nll in (unigrams + 1e-3, unigrams - 1e-3, unigrams + 1):  # once open, it stays so
            memory, controls, stop = recipe.react(memory, 4, {"validation/projector_nll": nll})
            seen.append(controls["kd"])
            assert stop is None
        assert seen == [0, 1, 1]
        weights = weights_of(recipe, controls)
        assert (float(weights["lm"]), float(weights["kd"])) == pytest.approx((0.3, 0.7))


class TestALM(Chunked):
    """A teacher of another tokenizer, by the likelihood of spans."""

    name = "alm"


class TestTypes:
    def test_parameters_and_moments_are_float32_and_so_is_the_loss(self, job):
        half = dict(dtype="bfloat16")
        one = conftest.ready(job, **cases.RAMPS | dict(student=half, teacher=half, train=dict(ema=0.9)), dry=True)
        held = jax.tree.leaves((one.abstract.params, one.abstract.opt, one.abstract.ema))
        assert {leaf.dtype for leaf in held if jnp.issubdtype(leaf.dtype, jnp.inexact)} == {jnp.dtype("float32")}
        batch = next(one.built.recipe.data("train", 0))
        after, metrics = jax.eval_shape(one.step, one.abstract, one.frozen, batch)
        wanted, found = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (one.abstract, after))
        assert found == wanted
        assert {metrics["loss"].dtype, *(x.dtype for x in jax.tree.leaves(metrics["terms"]))} == {jnp.dtype("float32")}

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_matrices_are_multiplied_in_the_type_that_was_asked_for(self, job, dtype):
        """Forward and backward. (Where attention's float32 scores go back, one side of a product is float32.)"""
        one = conftest.ready(job, student=dict(dtype=dtype), teacher=dict(dtype=dtype), dry=True)
        program = jax.make_jaxpr(one.step)(one.abstract, one.frozen, next(one.built.recipe.data("train", 0)))
        found = list(products(program.jaxpr))
        assert all(jnp.dtype(dtype) in pair for pair in found)
        assert sum(len(pair) > 1 for pair in found) < 0.1 * len(found)


def products(jaxpr):
    """Of every matrix product of a program, the types of what it multiplies."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield {x.aval.dtype for x in equation.invars}
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from products(getattr(inner, "jaxpr", inner))
