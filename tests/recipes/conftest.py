"""A small job on real words: documents made of them, a tokenizer, a teacher folder. All of one worker's tests share it."""

import random
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict, FieldReference

import jaxdistill
from jaxdistill.data import text, tokenizer
from jaxdistill.models import gpt2
from jaxdistill.training import plan, prepare, sharding
from jaxdistill.training.defaults import defaults

TEXT = dict(source="files", path="", field="text", invalid_utf8="error", tokenizer="", vocab=300, length=16, validation=0.2,
            test=0.2, train_tokens=0, eval_tokens=0)

ON = dict(weight=((0.0, 1.0),))  # of a term


def documents(folder: Path, count: int = 40) -> None:
    """Sentences of a few words: short documents, so that rows hold several of them and padding."""
    words = ("the", "a", "cat", "dog", "tree", "house", "sees", "finds", "likes", "small", "red", "old", "and", "then", "under",
             "über", "日本", "café")
    draw = random.Random(0)
    for i in range(count):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(words, k=draw.randint(3, 30))) + f" {i}.\n")


def config(folder: Path) -> ConfigDict:
    c = defaults()
    c.mesh, c.headline = (1, 1, 1), "kd"
    c.data = ConfigDict(TEXT | dict(path=str(folder / "text")))
    c.student = ConfigDict(dict(path="", width=16, depth=1, heads=2, dtype="float32", remat=False))
    path, cache = (FieldReference(value, field_type=object) for value in (str(folder / "teacher"), ""))  # of one or of several
    c.teacher = ConfigDict(dict(path=path, cache=cache, width=16, depth=2, heads=2, dtype="float32", remat=False))
    c.lm = ConfigDict(dict(smoothing=0.0))
    c.kd = ConfigDict(dict(weight=((0.0, 0.5),), temperature=((0.0, 2.0),)))
    c.train.update(dict(steps=8, batch=8, lr=1e-2, eval_every=4, checkpoint_every=4))
    c.probes.every = 1
    c.runs = ("kd",)
    c.run = ConfigDict(dict(kd=dict(recipe="student_aware")))
    return c


def ready(job: Path, *, mesh=(1, 1, 1), recipe="student_aware", dry=False, **changes) -> prepare.Prepared:
    """The one run of `config(job)`, of `recipe` and with sections changed, made ready."""
    return prepare.prepare(build(job, mesh=mesh, recipe=recipe, **changes), sharding.make_mesh(mesh), dry=dry)


def build(job: Path, *, mesh=(1, 1, 1), recipe="student_aware", **changes) -> prepare.Built:
    c = config(job)
    c.run.kd.recipe = recipe
    if recipe == "lm":
        c.model = dict(c.student)
    c.mesh = mesh
    c.update(changes)
    return prepare.build(plan.expand(c)[0])


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """The folder of a job: text/, and teacher/."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "text").mkdir()
    documents(folder / "text")
    corpus = text.load(text.TextConfig(**TEXT | dict(path=str(folder / "text"))))
    teacher(folder / "teacher", corpus.tokenizer, length=16)
    return folder


@pytest.fixture(scope="session")
def other(job):
    """The folder of a teacher of another tokenizer: fewer merges, learned from other text; another width and number of heads."""
    learned = tokenizer.train(["the cat and the dog and the tree then under the house"], 270, "other")
    teacher(job / "other", learned, length=40, width=24, heads=4)
    return job / "other"


def teacher(folder: Path, tok: tokenizer.Tokenizer, *, length: int, width: int = 16, heads: int = 2, depth: int = 2) -> None:
    """A GPT-2 of random weights, wide enough to be far from any student."""
    module = gpt2.GPT2(gpt2.GPT2Config(vocab=tok.vocab, length=length, width=width, depth=depth, heads=heads))
    params = module.init(jax.random.key(5), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 4 * x, params)
    gpt2.to_hf(module, params, folder, bos_token_id=tok.eos, eos_token_id=tok.eos)
    tokenizer.save(tok, str(folder))


def refusal(body, capsys) -> str:
    """The one line of a command that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        jaxdistill.command(body)
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line
