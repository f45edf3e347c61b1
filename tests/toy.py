"""A recipe that lives outside the package: ragged masks, a whole-batch term, a frozen leaf, a teacher.

Its size is a toy's; its shape is what every recipe may use of the contract.
"""

from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.recipe import Aux, Evaluator, Group, Recipe, Schedule, Term, Variables, on_host
from jaxdistill.training import store

ROWS, TIME, WIDTH = 64, 6, 8
TEACHER = 7  # the seed of the teacher, where no folder is given
FACTS = {"rows": ROWS}


def make(config) -> Recipe:
    toy, steps, batch = config.toy, config.train.steps, config.train.batch
    contrast, poison, stop, dead = toy.contrast, toy.poison, toy.stop, toy.dead
    teacher, begin = toy.teacher, toy.start  # exported folders, or ""
    fit = toy.fit  # whether `extra` begins as what is found in a batch
    weights = {"fit": Schedule(((0.0, 1.0),)), "kd": Schedule.ramp(toy.kd, steps, "config key toy.kd"),
               "contrast": Schedule(((0.0, contrast),))}

    def forward(params, x):
        hidden = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"][None, None])
        return hidden @ params["head"]["kernel"], hidden

    def loss(params, extra, frozen, batch, dials, key):
        x, y, where = batch["x"], batch["y"], batch["where"]
        out, hidden = forward(params, x)
        out = out + 0.0 * params["dead"]["kernel"].sum() if dead else out
        count = where.sum().astype(jnp.float32)
        terms, total = {}, jnp.zeros(())
        fit = jnp.sum(jnp.where(where, jnp.square(out[..., 0] - y), 0.0))
        fit = fit * jnp.where(jnp.any(batch["index"] == poison), jnp.nan, 1.0)
        total, terms["fit"] = total + dials.scale["fit"] * fit, Term(fit, count)
        if not weights["kd"].off:
            target, _ = forward(jax.lax.stop_gradient(frozen["teacher"]), x)
            every = jnp.asarray(where.shape[0] * TIME, jnp.float32)
            kd = jnp.sum(jnp.square(out - target))
            total, terms["kd"] = total + dials.scale["kd"] * kd, Term(kd, every)
        mean = jnp.sum(hidden * where[..., None], axis=1) / jnp.maximum(where.sum(1), 1)[:, None]
        stats = {"mean": mean} if contrast else {}
        order = jnp.sum(batch["index"] * (1 + jnp.arange(where.shape[0])))  # tells which rows came, and in which order
        probes = {"valid": (count, jnp.asarray(where.size, jnp.float32)), "order": (order.astype(jnp.float32), jnp.ones(()))}
        return total, Aux(terms, stats, probes)

    def whole(params, extra, stats, knobs):
        if not contrast:
            return {}, extra
        z = stats["mean"] @ params["projector"]["kernel"]
        z = z / jnp.sqrt(jnp.sum(z**2, axis=-1, keepdims=True) + 1e-6)
        scores = z @ z.T / 0.5
        nce = jnp.sum(jax.nn.logsumexp(scores, axis=-1) - jnp.diagonal(scores))
        seen = {"mean": 0.9 * extra["mean"] + 0.1 * jax.lax.stop_gradient(stats["mean"]).mean(0)}
        return {"contrast": Term(nce, jnp.asarray(z.shape[0], jnp.float32))}, seen

    def calibrate(variables, frozen, batches):
        one = next(iter(batches))
        hidden = on_host(jax.jit(lambda params, x: forward(params, x)[1])(variables.params, one["x"]))
        return variables._replace(extra={"mean": hidden.mean(axis=(0, 1))})

    def teach(place):
        made = init(jax.random.key(TEACHER)).params
        return {"teacher": load(teacher, made) if teacher else made}

    def init(key):
        keys = jax.random.split(key, 4)
        normal = lambda i, *shape: 0.3 * jax.random.normal(keys[i], shape)  # noqa: E731
        params = {
            "body": {"kernel": normal(0, WIDTH, WIDTH), "bias": jnp.zeros(WIDTH)}, "head": {"kernel": normal(1, WIDTH, 1)},
            "still": {"kernel": jnp.ones((WIDTH, 2))},
        }
        if contrast:
            params["projector"] = {"kernel": normal(2, WIDTH, WIDTH)}
        if dead:
            params["dead"] = {"kernel": normal(3, WIDTH, WIDTH)}
        if begin:
            params = load(begin, params)
        return Variables(params, {"mean": jnp.zeros(WIDTH)})

    def data(split, seed):
        made = rows({"train": 0, "validation": 1, "test": 2}[split])
        source = grain.MapDataset.range(ROWS)
        source = source.seed(seed).shuffle().repeat() if split == "train" else source
        mine = jax.process_index() * (batch // jax.process_count()) + np.arange(batch // jax.process_count())
        take = lambda i: {k: v[i[mine]] for k, v in made.items()}  # noqa: E731  (this process's rows of the global batch)
        ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4) if split == "train" else grain.ReadOptions(num_threads=0)
        return iter(source.batch(batch, drop_remainder=True).map(take).to_iter_dataset(ahead))

    def measure(params, variables, frozen, batch):
        out, _ = forward(params, batch["x"])
        error = jnp.where(batch["where"], jnp.square(out[..., 0] - batch["y"]), 0.0)
        return {"sum": error.sum(), "count": batch["where"].sum()}

    def react(memory, step, metrics):
        memory = {"seen": [*memory["seen"], step]}
        return memory, {"lr": 0.5 if len(memory["seen"]) > 1 else 1.0}, "enough" if step == stop else None

    finish = lambda rows: {"error": rows["sum"].sum() / rows["count"].sum()}  # noqa: E731
    return Recipe(
        init=init, loss=loss, weights=weights, whole=whole, data=data, react=react, memory={"seen": []},
        optim_rules=((r"(body|head|dead)/kernel", Group("body", 1.0, 0.1)), (r"bias", Group("rest")),
                     (r"projector", Group("projector", 5.0, 0.1)), (r"still", Group("still", frozen=True))),
        sharding_rules=((r"(body|projector|dead)/kernel", jax.P("fsdp", "model")), (r"body/bias", jax.P(("fsdp", "model")))),
        evaluators={split: Evaluator(split, measure, finish) for split in ("validation", "test")},
        frozen=teach,
        calibrate=calibrate if fit else None,
        facts=FACTS | {"teacher": store.folder_digest(Path(teacher)) if teacher else TEACHER},
        export=export,
    )


def export(params, folder) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params").write_bytes(b"".join(np.asarray(leaf, np.float32).tobytes() for leaf in jax.tree.leaves(params)))


def load(folder: str, like):
    """The exported parameters of `folder`, of the shapes of `like`."""
    flat = np.frombuffer((Path(folder) / "params").read_bytes(), np.float32)
    leaves, tree = jax.tree.flatten(like)
    parts = np.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return tree.unflatten([jnp.asarray(part.reshape(leaf.shape)) for part, leaf in zip(parts, leaves, strict=True)])


def rows(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, TIME, WIDTH)).astype(np.float32)
    lengths = rng.integers(1, TIME + 1, ROWS)
    return {"x": x, "y": np.sin(x.sum(-1)), "where": np.arange(TIME) < lengths[:, None], "index": np.arange(ROWS)}
