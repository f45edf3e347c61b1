"""The small trained maps between two models: projectors of states, a head map, learned layer weights.

None of them is part of the deployed student; none is exported.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdistill import UserError

KINDS = ("linear", "mlp")
# How the map from the teacher's states to the student's begins. `lstsq` and `heads` are fitted (recipes.student_aware); until
# then, and in a shape check, they are orthogonal.
INITS = {
    "lstsq": nn.initializers.orthogonal(),
    "heads": nn.initializers.orthogonal(),
    "orthogonal": nn.initializers.orthogonal(),
    "normal": nn.initializers.normal(0.01),
    "kaiming_uniform": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # torch.nn.Linear's default
}
FITTED = ("lstsq", "heads")


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """The section `projector`: teacher's states -> student's space, where the student's head reads them. weight: of its anchor.
    ridge: of `lstsq` and `heads`, as a share of the mean diagonal. calibration: batches that `lstsq` looks at. gate: `kd` opens
    only when the projected teacher predicts better than token frequencies do."""

    kind: str = "linear"
    init: str = "lstsq"
    weight: float = 1.0
    lr_mult: float = 5.0
    ridge: float = 1e-3
    calibration: int = 8
    gate: bool = True

    def __post_init__(self):
        for key, accepted in (("kind", KINDS), ("init", INITS)):
            if getattr(self, key) not in list(accepted):
                raise UserError(f"config key projector.{key}: found {getattr(self, key)!r}; accepted: {', '.join(accepted)}")
        if self.kind != "linear" and self.init in FITTED:
            raise UserError(f"config key projector.init: found {self.init!r} with projector.kind {self.kind!r}; "
                            f"accepted: {', '.join(name for name in INITS if name not in FITTED)} (only a matrix can be fitted)")
        for key, least in (("lr_mult", 0), ("calibration", 1)):
            if not getattr(self, key) >= least:
                raise UserError(f"config key projector.{key}: found {getattr(self, key)}; accepted: {least} or more")
        for key in ("weight", "ridge"):  # (a projector that stays as it begins: lr_mult 0. Without ridge a dead channel has no solution)
            if not getattr(self, key) > 0:
                raise UserError(f"config key projector.{key}: found {getattr(self, key)}; accepted: a number above 0")


class Projector(nn.Module):
    """[..., width in] -> [..., width], by a matrix (`linear`) or Dense-LayerNorm-GELU-Dense (`mlp`)."""

    width: int
    kind: str = "linear"
    start: str = "orthogonal"  # of INITS
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... _"]) -> Float[Array, "... width"]:
        x = x.astype(self.dtype)
        if self.kind == "mlp":
            x = nn.Dense(self.width, dtype=self.dtype, name="up")(x)
            x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
            x = nn.gelu(x)
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=INITS[self.start], name="out")(x)


class LayerProjectors(nn.Module):
    """One projector for each of the student's blocks, and learned layer weights: softmax of scores that begin equal. (Of one
    block there is nothing to weigh: it has no score, which could get no gradient.)"""

    layers: int
    width: int
    kind: str = "linear"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, blocks: list) -> tuple[list, Float[Array, " layers"]]:
        scores = self.param("scores", nn.initializers.zeros, (self.layers,)) if self.layers > 1 else jnp.zeros(1)
        projected = [Projector(self.width, self.kind, dtype=self.dtype, name=f"block_{i}")(x) for i, x in enumerate(blocks)]
        return projected, jax.nn.softmax(scores)


class HeadMap(nn.Module):
    """The teacher's attention rows, mixed into as many heads as the student has: each a convex mix, so still a row of
    probabilities. Equal counts and a teacher of one head need no map and have none (the parameters are then empty)."""

    heads: int

    @nn.compact
    def __call__(self, teacher: Float[Array, "batch teacher_heads query key"]) -> tuple:
        """-> (rows [batch, heads, query, key], mixing weights [heads, teacher_heads])."""
        count = teacher.shape[1]
        if count == self.heads:
            return teacher, jnp.eye(count)
        if count == 1:
            return jnp.repeat(teacher, self.heads, axis=1), jnp.ones((self.heads, 1))
        scores = self.param("scores", nn.initializers.normal(0.02), (self.heads, count))
        weights = jax.nn.softmax(scores, axis=-1)
        return jnp.einsum("st,btqk->bsqk", weights, teacher), weights


def moments(inputs: Float[Array, "*batch width"], outputs: Float[Array, "*batch other"], where: Any) -> dict:
    """Sums over the tokens that count, of which `fit` is a function: add those of several batches."""
    inputs, outputs = (jnp.where(where[..., None], x.astype(jnp.float32), 0.0).reshape(-1, x.shape[-1]) for x in (inputs, outputs))
    inputs = jnp.concatenate([inputs, where.reshape(-1, 1).astype(jnp.float32)], axis=1)  # the last column is the bias
    return {"xx": inputs.T @ inputs, "xy": inputs.T @ outputs}


def fit(sums: dict, ridge: float) -> dict:
    """The parameters of a linear Projector that maps inputs to outputs best in least squares, with ridge on the matrix; in
    float64 on the host: the inputs of a trained network are far from independent."""
    xx, xy = (np.asarray(sums[name], np.float64) for name in ("xx", "xy"))
    width = len(xx) - 1
    if not xx[width, width]:
        raise UserError("config key projector.calibration: found no aligned token in its batches, which leaves nothing to fit; accepted: "
                        "more batches, or projector.init 'orthogonal'")
    penalty = np.full(width + 1, ridge * np.trace(xx[:width, :width]) / width)
    penalty[width] = 1e-6 * max(xx[width, width], 1.0)
    solved = np.linalg.solve(xx + np.diag(penalty), xy).astype(np.float32)
    return {"out": {"kernel": jnp.asarray(solved[:-1]), "bias": jnp.asarray(solved[-1])}}


def from_heads(teacher_head: Float[Any, "tokens teacher_width"], student_head: Float[Any, "tokens width"], ridge: float) -> dict:
    """The parameters of a linear Projector P for which P(h) @ student_head.T is nearest to h @ teacher_head.T for any h (as the
    initialisation of DSKD v2, Zhang et al., arXiv 2504.11426): both heads [shared tokens, width], row for row the same token."""
    theirs, ours = (np.asarray(head, np.float64) for head in (teacher_head, student_head))
    gram = ours.T @ ours
    gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    kernel = np.linalg.solve(gram, ours.T @ theirs).T.astype(np.float32)
    return {"out": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(kernel.shape[1], jnp.float32)}}
