"""The KD step against a plain PyTorch + transformers loop: same weights, same batch, same machine, same run.

    python experiments/bench_step/bench.py --vocab 8192 --batch 8 --length 128 --steps 30
    python experiments/bench_step/bench.py --vocab 50257 --batch 8 --length 256 --steps 10
    python experiments/bench_step/bench.py --vocab 50257 --batch 8 --length 256 --memory
    python experiments/bench_step/bench.py --overhead

Needs the extra `parity` (torch). Teacher 6 x 384, student 4 x 256, float32, AdamW, clip 1.0, T = 2, weight 0.5. Steps are
interleaved (one of each in turn) and medians compared, so that a noisy machine is noisy for both.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.data import text, tokenizer
from jaxdistill.models import gpt2
from jaxdistill.training import loop, plan, prepare, sharding
from jaxdistill.training.defaults import defaults

TEACHER, STUDENT = dict(width=384, depth=6, heads=6), dict(width=256, depth=4, heads=4)


def config(folder: Path, args, steps: int):
    """A job of one run: student_aware between two folders of random weights."""
    c = defaults()
    c.data = dict(source="stdlib", path="", field="text", invalid_utf8="error", tokenizer="", vocab=args.vocab, length=args.length,
                  validation=0.05, test=0.05, train_tokens=200_000, eval_tokens=args.batch * args.length)
    c.teacher = dict(path=str(folder / "teacher"), width=1, depth=1, heads=1, dtype="float32", remat=False)
    c.student = c.teacher.copy_and_resolve_references()
    c.student.path = str(folder / "student")
    c.lm = dict(smoothing=0.0)
    c.kd = dict(weight=((0.0, 0.5),), temperature=((0.0, 2.0),))
    c.train.update(dict(steps=steps, batch=args.batch, lr=1e-4, eval_every=10**6, checkpoint_every=10**6))
    c.runs, c.run = ("kd",), dict(kd=dict(recipe="student_aware"))
    return c


def models(folder: Path, args, corpus) -> None:
    for name, sizes, seed in (("teacher", TEACHER, 0), ("student", STUDENT, 1)):
        module = gpt2.GPT2(gpt2.GPT2Config(vocab=corpus.vocab, length=args.length, **sizes))
        params = module.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
        gpt2.to_hf(module, params, folder / name, bos_token_id=corpus.eos, eos_token_id=corpus.eos)
        tokenizer.save(corpus.tokenizer, str(folder / name))


def torch_step(folder: Path, batch: dict):
    """A step as one would write it by hand, eager."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(len(__import__("os").sched_getaffinity(0)))
    teacher = GPT2LMHeadModel.from_pretrained(folder / "teacher").eval()
    student = GPT2LMHeadModel.from_pretrained(folder / "student").eval()  # eval: no dropout, as here
    adam = torch.optim.AdamW(student.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)
    tokens = torch.from_numpy(batch["tokens"]).long()
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)

    def step() -> float:
        with torch.no_grad():
            target = teacher(inputs).logits
        logits = student(inputs).logits
        vocab = logits.shape[-1]
        lm = torch.nn.functional.cross_entropy(logits.view(-1, vocab), labels)
        kd = 4.0 * torch.nn.functional.kl_div(
            torch.log_softmax(logits / 2.0, -1).view(-1, vocab), torch.softmax(target / 2.0, -1).view(-1, vocab),
            reduction="batchmean")
        loss = 0.5 * lm + 0.5 * kd
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        adam.step()
        return loss.item()

    return step


def ours(folder: Path, args):
    """(step, batch): the step that training runs, ledger, norms and gates' flags included."""
    mesh = sharding.make_mesh((1, 1, 1))
    built = prepare.build(plan.expand(config(folder, args, 1000))[0])
    ready = prepare.prepare(built, mesh)
    # One document a row, so that torch, which knows no segments, does the same sums.
    host = next(built.recipe.data("train", 0))
    host |= {"segments": np.ones_like(host["segments"]), "positions": np.broadcast_to(np.arange(args.length + 1), host["tokens"].shape)}
    host["positions"] = np.ascontiguousarray(host["positions"], np.int32)
    batch = ready.place(host)
    compiled, _ = prepare.compile_step(ready, batch)
    state, frozen = [ready.state], ready.frozen

    def step() -> float:
        state[0], metrics = compiled(state[0], frozen, batch)
        jax.block_until_ready(state[0].params)
        return float(metrics["loss"])

    return step, host


def timed(step) -> float:
    since = time.perf_counter()
    step()
    return time.perf_counter() - since


def peak() -> float:
    """float32 matrix peak of this machine as XLA reaches it, FLOP/s."""
    a = jnp.ones((2048, 2048))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    return 2 * 2048**3 / min(timed(lambda: product(a).block_until_ready()) for _ in range(5))


def matmul_flops(args) -> float:
    """2 per multiply-add: the student forward and backward (3 x), the teacher forward."""
    def forward(width, depth, **_):
        return 2 * args.batch * args.length * (depth * (12 * width**2 + 2 * args.length * width) + width * args.vocab)

    return 3 * forward(**STUDENT) + forward(**TEACHER)


def versus_torch(folder: Path, args) -> None:
    step, batch = ours(folder, args)
    other = torch_step(folder, batch)
    first = step(), other()
    print(f"loss of the first step: jaxdistill {first[0]:.6f}, torch {first[1]:.6f}")
    assert abs(first[0] - first[1]) < 1e-4 * abs(first[1]), "not the same step"
    for _ in range(2):
        step(), other()
    times = [(timed(step), timed(other)) for _ in range(args.steps)]
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = sorted(b / a for a, b in times)
    top = peak()
    tokens = args.batch * args.length
    print(f"vocabulary {args.vocab:,}, batch {args.batch} x {args.length}, {args.steps} interleaved steps, medians")
    print(f"jaxdistill {mine:.3f} s ({tokens / mine:,.0f} tokens/s), torch {theirs:.3f} s ({tokens / theirs:,.0f} tokens/s): "
          f"{theirs / mine:.2f} x (step by step: {ratios[len(ratios) // 4]:.2f} to {ratios[3 * len(ratios) // 4]:.2f}, middle half)")
    share = [f"{matmul_flops(args) / seconds / top:.0%}" for seconds in (mine, theirs)]
    print(f"float32 matrix peak {top / 1e9:,.0f} GFLOP/s; jaxdistill at {share[0]}, torch at {share[1]}")


def memory(folder: Path, args) -> None:
    """How far three steps raise the peak of a process that holds models, data and program, each in its own process."""
    step, batch = ours(folder, args)
    np.save(folder / "tokens.npy", batch["tokens"])
    found = {}
    for name in ("ours", "torch"):
        sizes = [f"--{key}={getattr(args, key)}" for key in ("vocab", "batch", "length")]
        done = subprocess.run([sys.executable, __file__, *sizes, f"--raise={name}", f"--folder={folder}"], check=True, capture_output=True)
        found[name] = float(done.stdout.split()[-1])
    print(f"vocabulary {args.vocab:,}, batch {args.batch} x {args.length}: three steps raise the peak by {found['ours']:.0f} MiB here, "
          f"{found['torch']:.0f} MiB in torch: {found['ours'] / found['torch']:.2f} x")


def raised(folder: Path, args) -> None:
    step = ours(folder, args)[0] if getattr(args, "raise") == "ours" else torch_step(folder, {"tokens": np.load(folder / "tokens.npy")})
    status = lambda key: int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = status("VmRSS")
    for _ in range(3):
        step()
    print(status("VmHWM") - before)


def overhead(folder: Path, args) -> None:
    """The loop (data, transfer, metrics, gates, log lines) over the bare jitted step, alternately, four times."""
    ratios = []
    for turn in range(4):
        step, _ = ours(folder, args)
        for _ in range(3):
            step()
        since = time.perf_counter()
        for _ in range(args.steps):
            step()
        bare = (time.perf_counter() - since) / args.steps
        row = loop.run(config(folder, args, args.steps), folder / f"loop{turn}", quiet=True)["rows"][0]
        ratios.append(row["seconds"] / row["steps"] / bare)
        print(f"bare {bare * 1e3:.1f} ms, in the loop {row['seconds'] / row['steps'] * 1e3:.1f} ms: {ratios[-1]:.3f} x")
    print(f"loop overhead: {statistics.median(ratios) - 1:+.1%} (median of {len(ratios)})")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("vocab", 8192), ("batch", 8), ("length", 128), ("steps", 30)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--raise", choices=("ours", "torch"), help=argparse.SUPPRESS)  # of --memory: in a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if getattr(args, "raise"):
        raised(args.folder, args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus = text.load(plan.expand(config(folder, args, 1))[0].config.data.build(text.TextConfig))
        models(folder, args, corpus)
        (overhead if args.overhead else memory if args.memory else versus_torch)(folder, args)


if __name__ == "__main__":
    main()
