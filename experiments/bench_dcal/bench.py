"""The training step of DCAL against the same three streams in plain PyTorch: same weights, batch, machine and run.

    python experiments/bench_dcal/bench.py                                        # ViT-T, 112 pixels, batch 16, float32
    python experiments/bench_dcal/bench.py --image 224 --batch 64 --dtype bfloat16   # on a GPU
    python experiments/bench_dcal/bench.py --streams                              # the cost of each stream
    python experiments/bench_dcal/bench.py --memory --image 224 [--remat]         # what the rollout adds to the peak
    taskset -c 0 python experiments/bench_dcal/bench.py --clock cpu               # one core, on a machine with other work

Needs the extra `parity` (torch). SA + GLCA + PWCA with uncertainty weighting and decoupled decay (AdamW), rollout included. Steps are
interleaved (one of each in turn) and medians compared, so that a noisy machine is noisy for both. With other work on the cores wall
time says nothing of torch, whose threads wait for each other at every operation: there, take processor time on one core.
"""

import argparse
import functools
import os
import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from jaxdistill.losses import weighting
from jaxdistill.losses.classification import cross_entropy
from jaxdistill.models import dcal, vit

STREAMS = {"sa": dict(glca=False, pwca=""), "sa_glca": dict(pwca=""), "sa_pwca": dict(glca=False), "full": {}}
LR, DECAY, BETAS, CLASSES = 5e-4, 0.05, (0.9, 0.999), 200


def make(args, **branches):
    """(module, params, batch): random weights, an image batch with labels, and each one's partner."""
    sizes = vit.PRESETS[args.preset] | {"classes": CLASSES, "image": (args.image, args.image)}
    module = dcal.DCAL(vit.ViTConfig(**sizes), dcal.Branches(**branches), dtype=jnp.dtype(args.dtype), remat=args.remat)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(args.batch, args.image, args.image, 3)).astype(np.float32),
        "label": rng.integers(0, CLASSES, args.batch).astype(np.int32),
        "partner": np.roll(np.arange(args.batch, dtype=np.int32), 1),
    }
    return module, vit.initialise(module, jax.random.key(0)), batch


def ours(module, params, batch):
    """The step as training has it, without ledger and gates."""
    names = [name for name, there in (("sa", True), ("glca", module.branches.glca), ("pwca", module.branches.pwca)) if there]
    params = {"model": params, "w": {name: jnp.zeros(()) for name in names}}
    decayed = lambda tree: jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", tree)  # noqa: E731
    optimizer = optax.adamw(LR, *BETAS, weight_decay=DECAY, mask=decayed)

    def loss(params, batch):
        outputs, _ = module.apply({"params": params["model"]}, batch["image"], partner=batch["partner"] if "pwca" in names else None)
        each = {name: cross_entropy(outputs[name], batch["label"]).mean() for name in names}
        return sum(weighting.factor(params["w"][name]) * each[name] for name in names) + weighting.prior(params["w"])

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, batch):
        params, moments = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    batch = jax.device_put(batch)
    state = [jax.tree.map(jnp.copy, (params, optimizer.init(params)))]
    compiled = update.lower(state[0], batch).compile()

    def step() -> float:
        state[0], value = compiled(state[0], batch)
        jax.block_until_ready(state[0])
        return float(value)

    return step, compiled


def theirs(module, params, batch, dtype: str, device: str):
    """The paper's three streams as one would write them by hand, eager. Attention by scaled_dot_product_attention wherever its weights
    are not needed: in PWCA and GLCA; the rollout needs those of SA."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    c, branches = module.vit, module.branches
    heads = lambda x: x.unflatten(-1, (c.heads, -1)).transpose(1, 2)  # noqa: E731

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = (nn.LayerNorm(c.width, eps=c.eps) for _ in range(2))
            self.qkv, self.out = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)
            self.up, self.down = nn.Linear(c.width, 4 * c.width), nn.Linear(4 * c.width, c.width)

        def after(self, x, attended):
            x = x + self.out(attended.transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(self.ln_2(x))))

        def with_weights(self, x):
            q, k, v = (heads(y) for y in self.qkv(self.ln_1(x)).chunk(3, -1))
            attention = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
            return self.after(x, attention @ v), attention.detach(), (k, v)

        def pairwise(self, x, pair):
            q, k, v = (heads(y) for y in self.qkv(self.ln_1(x)).chunk(3, -1))
            k, v = (torch.cat([own, other], 2) for own, other in zip((k, v), pair, strict=True))
            return self.after(x, F.scaled_dot_product_attention(q, k, v))

        def local(self, x, rows):
            h = self.ln_1(x)
            q = F.linear(h.gather(1, rows), self.qkv.weight[: c.width], self.qkv.bias[: c.width])
            k, v = F.linear(h, self.qkv.weight[c.width :], self.qkv.bias[c.width :]).chunk(2, -1)
            return self.after(x.gather(1, rows), F.scaled_dot_product_attention(heads(q), heads(k), heads(v)))

    class DCAL(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, c.width, c.patch, c.patch)
            self.cls, self.position = nn.Parameter(torch.zeros(1, 1, c.width)), nn.Parameter(torch.zeros(1, 1 + c.patches, c.width))
            self.block, self.glca_block = nn.ModuleList(Block() for _ in range(c.depth)), Block() if branches.glca else None
            self.ln_f, self.glca_ln_f = (nn.LayerNorm(c.width, eps=c.eps) for _ in range(2))
            self.head, self.glca_head = (nn.Linear(c.width, c.classes) for _ in range(2))
            self.w = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in ("sa", "glca", "pwca")})

        def forward(self, images, partner):
            x = self.patch(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
            paired, rollout = x, None
            for block in self.block:
                x, attention, (k, v) = block.with_weights(x)
                if branches.glca:
                    with torch.no_grad():
                        mixed = 0.5 * attention.float().mean(1) + 0.5 * torch.eye(x.shape[1], device=x.device)
                        rollout = mixed if rollout is None else mixed @ rollout
                if branches.pwca:
                    paired = block.pairwise(paired, (k[partner], v[partner]))
            outputs = {"sa": self.head(self.ln_f(x)[:, 0])}
            if branches.glca:
                chosen = rollout[:, 0, 1:].topk(branches.count(c.patches)).indices + 1
                rows = F.pad(chosen, (1, 0))[..., None].expand(-1, -1, c.width)
                outputs["glca"] = self.glca_head(self.glca_ln_f(self.glca_block.local(x, rows)).mean(1))
            if branches.pwca:
                outputs["pwca"] = self.head(self.ln_f(paired)[:, 0])
            return outputs

    model = DCAL()
    _fill(model, params)
    model.to(device)
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and not re.search("cls|position", name)]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=1e-8)
    images = torch.tensor(batch["image"]).permute(0, 3, 1, 2).contiguous().to(device)
    label, partner = (torch.tensor(batch[name]).long().to(device) for name in ("label", "partner"))

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            outputs = model(images, partner)
        each = {name: F.cross_entropy(logits.float(), label) for name, logits in outputs.items()}
        loss = 0.5 * sum(torch.exp(-model.w[name]) * value + model.w[name] for name, value in each.items())
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.item()

    return step


def _fill(model, params) -> None:
    """Our weights in the torch model: Dense kernels are [in, out] there, and q, k, v one matrix here."""
    import torch

    flat = {path: torch.tensor(np.asarray(leaf)) for path, leaf in flatten_dict(params, sep="/").items()}
    state = model.state_dict()
    for name in [name for name in state if not name.startswith("w.")]:
        module, kind = name.rsplit(".", 1) if "." in name else ("", name)
        path = re.sub(r"block\.(\d+)", r"block_\1", module).replace(".", "/")
        path = path if path.startswith("glca") else f"vit/{path}"
        if not module or module == "patch":
            path = f"vit/embed/{path.removeprefix('vit/')}".rstrip("/")
        if path.endswith("/qkv"):
            parts = [flat[f"{path.removesuffix('qkv')}attention/{part}/{'kernel' if kind == 'weight' else 'bias'}"] for part in "qkv"]
            value = torch.cat([part.T if kind == "weight" else part for part in parts])
        else:
            path = re.sub(r"/(up|down)$", r"/mlp/\1", re.sub(r"/out$", "/attention/out", path))
            leaf = kind if not module else "bias" if kind == "bias" else "scale" if "ln_" in path else "kernel"
            if path.startswith("glca") and f"{path}/{leaf}" not in flat:
                continue  # no such stream in this run
            value = flat[f"{path}/{leaf}"]
            if kind == "weight":
                value = value.permute(3, 2, 1, 0) if value.ndim == 4 else value.T if value.ndim == 2 else value
        assert state[name].shape == value.shape, name
        state[name].copy_(value)
    model.load_state_dict(state)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(step, clock: str) -> float:
    since = CLOCKS[clock]()
    step()
    return CLOCKS[clock]() - since


def versus_torch(args) -> None:
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    module, params, batch = make(args)
    mine, _ = ours(module, params, batch)
    other = theirs(module, params, batch, args.dtype, device)
    first = [(mine(), other()) for _ in range(3)]
    print("losses of the first steps: jaxdistill " + " ".join(f"{a:.6f}" for a, _ in first) + ", torch " +
          " ".join(f"{b:.6f}" for _, b in first))
    near = 2e-2 if args.dtype == "bfloat16" else 1e-4
    assert all(abs(a - b) < near * abs(b) for a, b in first), "not the same step"
    times = [(timed(mine, args.clock), timed(other, args.clock)) for _ in range(args.steps)]
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    rng = np.random.default_rng(0)
    draws = np.array(times)[rng.integers(0, len(times), (2000, len(times)))]  # pairs, resampled
    low, high = np.percentile(np.median(draws[..., 1], 1) / np.median(draws[..., 0], 1), (2.5, 97.5))
    print(f"{args.preset}, {args.image} pixels, batch {args.batch}, {args.dtype}, {device}, {args.clock} time of "
          f"{args.steps} interleaved steps, medians")
    print(f"jaxdistill {a * 1e3:.1f} ms ({args.batch / a:,.1f} images/s), torch {b * 1e3:.1f} ms ({args.batch / b:,.1f} images/s): "
          f"{b / a:.2f} x (95 % interval {low:.2f} to {high:.2f})")


def streams(args) -> None:
    """Our step with each set of streams, in turn."""
    steps = {name: ours(*make(args, **branches))[0] for name, branches in STREAMS.items()}
    for _ in range(2):
        for step in steps.values():
            step()
    times = [[timed(step, args.clock) for step in steps.values()] for _ in range(args.steps)]
    medians = dict(zip(steps, map(statistics.median, zip(*times, strict=True)), strict=True))
    for name, seconds in medians.items():
        print(f"{name:8} {seconds * 1e3:8.1f} ms, {seconds / medians['sa']:.2f} x SA alone")


def memory(args) -> None:
    """Temporary memory of the compiled step, queries chosen by the rollout and at random (which needs no rollout)."""
    found = {}
    for select in ("rollout", "random"):
        _, compiled = ours(*make(args, select=select))
        found[select] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    print(f"{args.preset}, {args.image} pixels, batch {args.batch}, {args.dtype}: temporary memory of the step "
          f"{found['rollout']:.0f} MiB with the rollout, {found['random']:.0f} MiB without: {found['rollout'] / found['random']:.3f} x")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("image", 112), ("batch", 16), ("steps", 30)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--preset", default="deit_tiny", choices=list(vit.PRESETS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--remat", action="store_true", help="ours only")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--streams", action="store_true")
    args = parser.parse_args()
    (memory if args.memory else streams if args.streams else versus_torch)(args)


if __name__ == "__main__":
    main()
