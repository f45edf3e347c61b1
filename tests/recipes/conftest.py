"""A small job on real words: documents made of them, a tokenizer, a teacher folder. All of one worker's tests share it."""

import random
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from jaxdistill.data import text, tokenizer
from jaxdistill.models import gpt2
from jaxdistill.training.defaults import defaults

TEXT = dict(source="files", path="", field="text", invalid_utf8="error", tokenizer="", vocab=300, length=16, validation=0.2,
            test=0.2, train_tokens=0, eval_tokens=0)


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
    c.teacher = ConfigDict(dict(path=str(folder / "teacher"), width=16, depth=2, heads=2, dtype="float32", remat=False))
    c.lm = ConfigDict(dict(smoothing=0.0))
    c.kd = ConfigDict(dict(weight=((0.0, 0.5),), temperature=((0.0, 2.0),)))
    c.train.update(dict(steps=8, batch=8, lr=1e-2, eval_every=4, checkpoint_every=4))
    c.runs = ("kd",)
    c.run = ConfigDict(dict(kd=dict(recipe="student_aware")))
    return c


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """The folder of a job: text/, and teacher/ (random weights, wide enough to be far from any student)."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "text").mkdir()
    documents(folder / "text")
    corpus = text.load(text.TextConfig(**TEXT | dict(path=str(folder / "text"))))
    module = gpt2.GPT2(gpt2.GPT2Config(vocab=corpus.vocab, length=16, width=16, depth=2, heads=2))
    params = module.init(jax.random.key(5), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 4 * x, params)
    gpt2.to_hf(module, params, folder / "teacher", bos_token_id=corpus.eos, eos_token_id=corpus.eos)
    tokenizer.save(corpus.tokenizer, str(folder / "teacher"))
    return folder
