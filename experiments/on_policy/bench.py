"""Tokens a second: generation with a KV cache, and the same sampling with the whole row run anew for every token.

    python -m experiments.on_policy.bench [--repeats 5] [--only NAME] [--steps TEACHER]

Both draw the same tokens (checked), and of the row run anew only the one position that is asked for is multiplied by the head.
--steps: instead, of the study's mix_50 with a teacher's folder, the seconds of an update on text and of one on a sampled batch.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.models import gpt2, llama
from jaxdistill.models.generation import generate

MODELS = {  # name -> (module, rows, prompt)
    "GPT-2 2 x 96, 2,048 ids (the default student)": (gpt2.GPT2(gpt2.GPT2Config(2048, 128, 96, 2, 4)), 16, 32),
    "GPT-2 3 x 160, 2,048 ids (the default teacher)": (gpt2.GPT2(gpt2.GPT2Config(2048, 128, 160, 3, 4)), 32, 17),
    "GPT-2 6 x 384, 8,192 ids": (gpt2.GPT2(gpt2.GPT2Config(8192, 128, 384, 6, 6)), 4, 32),
    "Llama 6 x 384, 2 key heads of 6, 8,192 ids": (
        llama.Llama(llama.LlamaConfig(8192, 128, 384, 6, 6, 1024, kv_heads=2, tied=True)), 4, 32),
}


@functools.partial(jax.jit, static_argnames=("module", "new"))
def anew(module, params, prompt, *, new: int, key):
    """As `generate`, without a cache."""
    batch, width = prompt.shape
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
    head = params.get("head", params["wte"])["embedding"]

    def step(t, tokens):
        _, features = module.apply({"params": params}, tokens)
        final = jax.lax.dynamic_slice_in_dim(features["final"], width - 1 + t, 1, axis=1)[:, 0]
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, t), head.shape[:1]))(keys)
        chosen = jnp.argmax(final @ head.T + noise, axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(tokens, chosen[:, None], width + t, axis=1)

    return jax.lax.fori_loop(0, new, step, jnp.pad(prompt, ((0, 0), (0, new))))


def timed(repeats: int, run, *args, **options) -> float:
    """The median of the seconds that run(...) takes, once it is compiled."""
    jax.block_until_ready(run(*args, **options))
    took = []
    for _ in range(repeats):
        since = time.perf_counter()
        jax.block_until_ready(run(*args, **options))
        took.append(time.perf_counter() - since)
    return statistics.median(took)


def table(repeats: int, only: str) -> None:
    print("| model | rows, prompt + new | with a cache | run anew | ratio |\n|---|---|---|---|---|")
    for name, (module, rows, width) in ((name, made) for name, made in MODELS.items() if only in name):
        new = module.config.length - width
        params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        prompt = jnp.asarray(np.random.default_rng(0).integers(0, module.config.vocab, (rows, width)), jnp.int32)
        given = dict(new=new, key=jax.random.key(1))
        np.testing.assert_array_equal(generate(module, params, prompt, **given).tokens, anew(module, params, prompt, **given)[:, width:])
        cached, slow = (timed(repeats, run, module, params, prompt, **given) for run in (generate, anew))
        print(f"| {name} | {rows}, {width} + {new} | {rows * new / cached:,.0f} tokens/s | {rows * new / slow:,.0f} tokens/s "
              f"| {slow / cached:.1f} |", flush=True)


def steps(repeats: int, teacher: str) -> None:
    from experiments.on_policy import study
    from jaxdistill.training import plan, prepare, sampling, sharding

    config = study.get_config()
    config.teacher.path = teacher
    run = next(run for run in plan.expand(config) if run.name == "mix_50")
    one = prepare.prepare(prepare.build(run), sharding.make_mesh((1, 1, 1)))
    text = one.place(next(one.built.recipe.data("train", 0)))
    step, _ = prepare.compile_step(one, text)
    state, sampler = one.state, sampling.Sampling(one, one.state)
    chosen = int(np.flatnonzero(sampler.chosen)[0])

    def update(on_policy):
        nonlocal state
        batch = sampler.replace(chosen, state, text)[0] if on_policy else text
        state, metrics = step(state, one.frozen, batch)
        return metrics["loss"]

    found = [timed(repeats, update, on_policy) for on_policy in (False, True)]
    print(f"an update on text {found[0]:.4f} s, on a sampled batch {found[1]:.4f} s: {found[1] / found[0]:.2f} times")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="models with this in their name")
    parser.add_argument("--steps", default="")
    flags = parser.parse_args()
    steps(flags.repeats, flags.steps) if flags.steps else table(flags.repeats, flags.only)
