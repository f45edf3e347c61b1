"""Dense(512, 512) + KAF against the same layer with GELU: forward and backward, the naive formula and the fused one.

    python experiments/bench_kaf/bench.py                          # batch 256, float32, wall time
    taskset -c 0 python experiments/bench_kaf/bench.py --clock cpu    # one core, on a machine with other work

Gradients to the input, the matrix and the activation's own parameters (trained: gamma too). All are compiled first and then take turns,
so that a noisy machine is noisy for all, each twice, of which the second is timed (the naive formula empties the caches); medians are
compared. Memory is what the compiled program holds beside its arguments and results.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.models import kaf

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def programs(args) -> dict:
    """name -> (compiled value and gradient, arguments)."""
    rng = np.random.default_rng(0)
    x, pull = (jnp.asarray(rng.normal(size=(args.batch, args.width)), jnp.float32) for _ in range(2))
    kernel = jnp.asarray(rng.normal(size=(args.width, args.width)) / args.width**0.5, jnp.float32)
    preset = kaf.PRESETS[args.preset]
    points = tuple(preset.points.tolist())
    alpha = jnp.asarray(np.repeat(kaf.ridge(preset, kaf.TARGETS["elu"])[:, None], args.width, axis=1), jnp.float32)
    gamma = jnp.full(args.width, preset.gamma, jnp.float32)

    def layer(activation):
        return lambda x, kernel, *own: jnp.sum(activation(x @ kernel, *own) * pull)

    def of(evaluate, *own):
        return layer(lambda s, *own: evaluate(s, own[0], own[1] if len(own) > 1 else gamma, points)), (x, kernel, *own)

    found = {
        "GELU": (layer(lambda s: jax.nn.gelu(s, approximate=False)), (x, kernel)),
        "KAF, fused": of(kaf.kaf, alpha),
        "KAF, fused, gamma trained": of(kaf.kaf, alpha, gamma),
        "KAF, naive": of(kaf.naive, alpha),
        "KAF, naive, gamma trained": of(kaf.naive, alpha, gamma),
    }
    compile_ = lambda f, given: jax.jit(jax.value_and_grad(f, tuple(range(len(given))))).lower(*given).compile()  # noqa: E731
    return {name: (compile_(f, given), given) for name, (f, given) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("batch", 256), ("width", 512), ("repeats", 50)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--preset", default="paper", choices=list(kaf.PRESETS))
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    args = parser.parse_args()
    clock, compiled = CLOCKS[args.clock], programs(args)
    results = {name: jax.block_until_ready(program(*given)) for name, (program, given) in compiled.items()}
    for kind in ("", ", gamma trained"):
        for a, b in zip(results[f"KAF, fused{kind}"][1], results[f"KAF, naive{kind}"][1], strict=True):
            assert float(jnp.max(jnp.abs(a - b))) < 1e-4 * float(jnp.max(jnp.abs(b))), "not the same gradient"
    times = {name: [] for name in compiled}
    for _ in range(args.repeats):
        for name, (program, given) in compiled.items():
            jax.block_until_ready(program(*given))
            since = clock()
            jax.block_until_ready(program(*given))
            times[name].append(clock() - since)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"Dense({args.width}, {args.width}) and activation, batch {args.batch}, {jax.default_backend()}, {args.clock} time of "
          f"{args.repeats} interleaved passes forward and backward, medians")
    for name, (program, _) in compiled.items():
        held = program.memory_analysis().temp_size_in_bytes / 2**20
        print(f"{name:26} {medians[name] * 1e3:8.2f} ms, {medians[name] / medians['GELU']:5.2f} x GELU, {held:6.1f} MiB held")


if __name__ == "__main__":
    main()
