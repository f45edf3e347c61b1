"""The cases of the language recipes: how their batches are cut, padded and masked, and what must hold of text besides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from tests.invariants.checks import Case, Invariants, measure
from tests.recipes import conftest

LENGTHS = np.array([17, 2, 9, 0, 4, 17, 1, 12])  # of the rows: some hold nothing
OF_PADDING = {"aligned": -1, "spans": -1, "teacher_spans": -1}  # the other arrays hold 0 there
RAMPS = dict(
    kd=dict(weight=((0.0, 0.1), (0.5, 0.7)), temperature=((0.0, 2.0), (1.0, 1.5))),
    attention=dict(weight=((0.1, 0.0), (0.4, 0.1))),
    router=dict(weight=((0.1, 0.0), (0.4, 0.1)), k=((0.0, 1.0), (1.0, 2.0)), temperature=((0.0, 1.0), (1.0, 0.5))),
    hidden=dict(weight=((0.4, 0.0), (0.7, 0.05))),
    contrastive=dict(weight=((0.6, 0.0), (0.9, 0.05))),
)


def ready(job, **changes):
    """By plain SGD, without a clip: see Case."""
    return conftest.ready(job, **dict(optimizer=dict(name="sgd", momentum=0.9, clip=0.0)) | changes)


def make(name: str, job, other) -> Case:
    if name == "lm":
        return language(job, recipe="lm")
    if name == "logits":
        return language(job, kd=RAMPS["kd"], taught=lambda: equal(job, kd=RAMPS["kd"]), zero=("kd",))
    if name == "every":  # four heads beside the teacher's two: the rows of attention need a map
        student = dict(depth=2, heads=4)
        return language(job, **RAMPS, student=student, taught=lambda: equal(job, **RAMPS), zero=("kd", "attention", "hidden"))
    return language(job, teacher=dict(path=str(other)), kd=dict(mode=name, weight=RAMPS["kd"]["weight"]))


def language(job, *, taught=None, zero=(), **changes) -> Case:
    one = ready(job, **changes)
    return Case(
        ready=one, batch=cut(next(one.built.recipe.data("train", 0)), LENGTHS), remade=lambda mesh: ready(job, mesh=mesh, **changes),
        padded=padded, masked=masked, taught=taught, zero=zero,
    )


def equal(job, **changes):
    """A student of the teacher's own weights, and projections that change nothing."""
    one = ready(job, student=dict(path=str(job / "teacher")), **changes)
    params = one.state.params
    if "layers" in params.get("match", {}):
        layers = params["match"]["layers"]
        blocks = {name: jax.tree.map(jnp.zeros_like, block) for name, block in layers.items() if name != "scores"}
        for block in blocks.values():
            block["out"]["kernel"] = jnp.eye(len(block["out"]["kernel"]))
        params = params | {"match": params["match"] | {"layers": layers | blocks}}
    return one, params


def cut(batch: dict, lengths) -> dict:
    """Row i keeps its first lengths[i] tokens; the rest of it is padding, whatever tokens lie there."""
    after = np.arange(batch["tokens"].shape[1]) >= np.asarray(lengths)[:, None]
    found = batch | {"segments": np.where(after, 0, batch["segments"])}
    if "spans" in batch:
        broken = [set(row[gone]) for row, gone in zip(batch["spans"], after[:, 1:], strict=True)]
        for name in ("spans", "teacher_spans"):  # a span is there whole or not at all
            lost = np.array([np.isin(row, list(gone)) for row, gone in zip(batch[name], broken, strict=True)])
            found[name] = np.where(lost, -1, batch[name]).astype(np.int32)
        found["aligned"] = np.where(after, -1, batch["aligned"]).astype(np.int32)
    return found


def nothing(batch: dict) -> dict:
    """As many rows as the data emits them past its end."""
    return {name: np.full_like(value, OF_PADDING.get(name, 0)) for name, value in batch.items()}


def padded(batch: dict) -> dict:
    more = {name: np.concatenate([value, nothing(batch)[name]]) for name, value in batch.items()}
    for side in ("", "teacher_"):
        if f"{side}tokens" in batch:
            more[f"{side}tokens"] = np.where(more[f"{side}segments"] > 0, more[f"{side}tokens"], 7).astype(np.int32)
    return more


def masked(batch: dict) -> dict:
    return nothing(batch) | {"tokens": batch["tokens"]}


def spelled(case: Case) -> dict:
    """The batch, with the ids 20, 21, ... in every row: none comes twice."""
    tokens = np.broadcast_to(20 + np.arange(17, dtype=np.int32), (8, 17))
    positions = np.broadcast_to(np.arange(17, dtype=np.int32), (8, 17))
    return case.batch | {"tokens": tokens, "segments": np.ones_like(tokens), "positions": positions, "valid": np.ones(8, bool)}


def speller(case: Case, *, copies: bool) -> dict:
    """Parameters of a student that is sure of the next id of `spelled`, or of the present one (copies).

    Its blocks add nothing. The embeddings of the ids stand at right angles; position p adds, a hundred times as long, that of
    the id that follows there."""
    params = case.ready.state.params
    student = jax.tree.map(jnp.zeros_like, params.get("student", params))
    right_angles = scipy.linalg.hadamard(16)[1:].astype(np.float32)  # without the row of ones: LayerNorm takes the mean away
    ids = np.concatenate([right_angles, -right_angles])[:17]
    student["wte"]["embedding"] = student["wte"]["embedding"].at[20:37].set(ids)
    student["ln_f"]["scale"] = jnp.full_like(student["ln_f"]["scale"], 10.0)
    if not copies:
        student["wpe"]["embedding"] = student["wpe"]["embedding"].at[:16].set(100 * ids[1:])
    return params | {"student": student} if "student" in params else student


class Language(Invariants):
    name = ""

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, job, other):
        return make(cls.name, job, other)

    def test_labels_are_the_next_tokens(self, case):
        """A perfect next-token student scores ~0, one that repeats the present token does not."""
        perfect, copier = (
            measure(case, spelled(case), params=speller(case, copies=copies), weights={"lm": 1.0}).raw["lm"] for copies in (False, True)
        )
        assert perfect < 1e-3
        assert copier > 100
