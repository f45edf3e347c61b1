"""Echo-state reservoirs (Jaeger 2001, GMD report 148): recurrent units whose weights are drawn and, as a rule, never trained.

    r[t] = (1 - a) r[t-1] + a tanh(x[t] W_in + r[t-1] W + b)

One goes forward and one backward in time, each with matrices of its own. W has signed entries and exactly the spectral radius asked
for: the largest eigenvalue, by ARPACK. (Power iteration is off by 1 to 6 %: the largest ones are complex pairs, close together.)
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from jaxtyping import Array, Bool, Float, Int

from jaxdistill import UserError

FUSIONS = ("concat", "convex", "attention")
DENSE = 64  # units up to which all eigenvalues are computed


@dataclasses.dataclass(frozen=True)
class ReservoirConfig:
    """The section `reservoir`. units: of each direction. density: share of W that is not 0. radius: spectral, of W. input_scale, bias:
    W_in and b are uniform within plus and minus this. leak: a, of (forward, backward). trained: matrices and leaks are where training
    begins, and their zeros stay (the radius does not). fusion of the two directions: concat | convex (a learned share for each unit) |
    attention (at every frame, a softmax over learned scores of both)."""

    units: int = 500
    density: float = 0.05
    radius: float = 0.95
    input_scale: float = 0.5
    bias: float = 0.1
    leak: tuple = (0.3, 0.3)
    trained: bool = False
    fusion: str = "concat"

    def __post_init__(self):
        def refuse(key, accepted):
            raise UserError(f"config key reservoir.{key}: found {getattr(self, key)!r}; accepted: {accepted}")

        if self.units < 2:
            refuse("units", "2 or more")
        if not 0 < self.density <= 1:
            refuse("density", "a share, above 0 and at most 1")
        for key in ("radius", "input_scale", "bias"):
            if not 0 <= getattr(self, key) < np.inf:
                refuse(key, "0 or more")
        leaks = len(self.leak) == 2 and all(isinstance(x, (int, float)) and 0 < x <= 1 for x in self.leak)
        if not leaks or (self.trained and max(self.leak) == 1):
            refuse("leak", "(forward, backward), each above 0 and " + ("below 1 with reservoir.trained" if self.trained else "at most 1"))
        if self.fusion not in FUSIONS:
            refuse("fusion", ", ".join(FUSIONS))


def radius(w: Any) -> float:
    """|largest eigenvalue| of a square matrix, dense or of scipy.sparse, to float64 precision; the same number every time."""
    size = w.shape[0]
    if size > DENSE:
        try:
            start = np.random.default_rng(0).normal(size=size)
            # Six, as single ones of a cluster converge badly; of which the largest is then certain to be among them.
            return float(np.abs(scipy.sparse.linalg.eigs(w, k=6, which="LM", v0=start, return_eigenvectors=False)).max())
        except scipy.sparse.linalg.ArpackError:  # no convergence
            pass
    return float(np.abs(np.linalg.eigvals(w.toarray() if scipy.sparse.issparse(w) else w)).max())


@functools.lru_cache(maxsize=8)  # the runs of a job share them
def draw(config: ReservoirConfig, inputs: int, seed: int) -> dict[str, np.ndarray]:
    """The matrices of both directions, float32: w_in [2, inputs, units], w [2, units, units], bias [2, units]; 0 forward, 1 backward.
    Functions of the arguments alone. UserError where W has no eigenvalue but 0 and so no radius can be set."""
    found = []
    for direction in range(2):
        rng = np.random.default_rng((seed, direction))
        shape = (config.units, config.units)
        w = rng.uniform(-1, 1, shape) * (rng.random(shape) < config.density)
        size = radius(scipy.sparse.csr_array(w) if config.density < 0.3 else w)
        if not size > 1e-6:
            raise UserError(f"config key reservoir.density: found {config.density} with {config.units} units, of which W is nilpotent; "
                            "accepted: more connections, a few for each unit")  # fmt: skip
        w_in = rng.uniform(-config.input_scale, config.input_scale, (inputs, config.units))
        found.append({"w_in": w_in, "w": w * (config.radius / size), "bias": rng.uniform(-config.bias, config.bias, config.units)})
    return {name: np.stack([one[name] for one in found]).astype(np.float32) for name in found[0]}


def constants(config: ReservoirConfig, inputs: int, seed: int) -> dict[str, np.ndarray]:
    """What `Reservoir` keeps outside of its parameters: the matrices; where those are trained, which connections of W there are."""
    drawn = draw(config, inputs, seed)
    return {"wired": drawn["w"] != 0} if config.trained else drawn


def run(
    matrices: dict[str, Array],
    leak: Float[Array, " directions"],
    x: Float[Array, "batch time inputs"],
    where: Bool[Array, "batch time"],
    initial: Float[Array, "directions batch units"] | None = None,
) -> Float[Array, "directions batch time units"]:
    """States of both directions, 0 at frames that do not count.

    The backward one goes from the last frame to the first: at padding its state stays as it is (0, or `initial`), so that it begins
    at the last frame that counts."""
    driven = jnp.einsum("bti,diu->dbtu", x, matrices["w_in"]) + matrices["bias"][:, None, None]
    driven = jnp.stack([driven[0], jnp.flip(driven[1], axis=1)])
    counts = jnp.stack([where, jnp.flip(where, axis=1)])
    start = jnp.zeros((2, len(x), matrices["w"].shape[-1]), driven.dtype) if initial is None else initial
    rate = leak[:, None, None]

    def step(state, frame):
        drive, counts = frame
        fresh = jnp.tanh(drive + jnp.einsum("dbu,duv->dbv", state, matrices["w"]))
        state = jnp.where(counts[..., None], (1 - rate) * state + rate * fresh, state)
        return state, state

    _, states = jax.lax.scan(step, start, (jnp.moveaxis(driven, 2, 0), jnp.moveaxis(counts, 2, 0)))
    states = jnp.moveaxis(states, 0, 2)
    states = jnp.stack([states[0], jnp.flip(states[1], axis=1)])
    return jnp.where(where[None, :, :, None], states, 0.0)


class Reservoir(nn.Module):
    """Both directions and their fusion, of `draw(config, inputs, seed)`: in the collection "constants", which is no part of what trains;
    with config.trained in "params", and in "constants" the zeros of W that stay."""

    config: ReservoirConfig
    seed: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch time inputs"], length: Int[Array, " batch"]) -> Float[Array, "batch time width"]:
        """[batch, time, 2 units] (concat) or [batch, time, units], 0 from `length` on, whatever x holds there."""
        c = self.config
        drawn, leak = draw(c, x.shape[-1], self.seed), jnp.asarray(c.leak, jnp.float32)
        kept = {name: self.variable("constants", name, lambda value=value: jnp.asarray(value)).value
                for name, value in constants(c, x.shape[-1], self.seed).items()}
        matrices = kept
        if c.trained:
            matrices = {name: self.param(name, lambda key, value=value: jnp.asarray(value)) for name, value in drawn.items()}
            matrices["w"] = jnp.where(kept["wired"], matrices["w"], 0.0)
            leak = jax.nn.sigmoid(self.param("leak", lambda key: jnp.log(leak / (1 - leak))))
        where = jnp.arange(x.shape[1])[None] < length[:, None]
        x, leak = jnp.where(where[..., None], x, 0.0).astype(self.dtype), leak.astype(self.dtype)
        states = run({name: value.astype(self.dtype) for name, value in matrices.items()}, leak, x, where)
        if c.fusion == "concat":
            return jnp.concatenate([states[0], states[1]], axis=-1)
        if c.fusion == "convex":
            share = jax.nn.sigmoid(self.param("share", nn.initializers.zeros, (c.units,)))[None, None].astype(self.dtype)
            return share * states[0] + (1 - share) * states[1]
        scores = self.param("scores", nn.initializers.normal(c.units**-0.5), (2, c.units))
        share = jax.nn.softmax(jnp.einsum("dbtu,du->dbt", states, scores.astype(self.dtype)), axis=0)
        return jnp.sum(share[..., None] * states, axis=0)


def memory_curve(
    matrices: dict[str, np.ndarray], leak: float, delays: int, *, direction: int = 0, steps: int = 3000, washout: int = 200, seed: int = 0
) -> Float[np.ndarray, " delays"]:
    """Jaeger's short-term memory: for k = 1 .. delays, the squared correlation of u[t - k] with the best linear readout of r[t], on
    steps that the readout was not fitted to. Their sum is the memory capacity, at most the number of units.

    u is uniform noise in [-1, 1], through the first column of W_in. In float64; the ridge is 1e-8 of the states' mean square."""
    w_in, w, bias = (np.asarray(matrices[name][direction], np.float64) for name in ("w_in", "w", "bias"))
    u = np.random.default_rng(seed).uniform(-1, 1, 2 * steps + washout)
    states, state = np.empty((len(u), len(w))), np.zeros(len(w))
    for t, value in enumerate(u):
        state = (1 - leak) * state + leak * np.tanh(value * w_in[0] + state @ w + bias)
        states[t] = state
    begin = max(washout, delays)
    rows = np.arange(begin, len(u))
    fit, held = np.array_split(rows, 2)
    design = np.concatenate([states, np.ones((len(u), 1))], axis=1)
    targets = np.stack([u[rows - k] for k in range(1, delays + 1)], axis=1)
    inner = design[fit].T @ design[fit]
    weights = np.linalg.solve(inner + 1e-8 * np.trace(inner) / len(inner) * np.eye(len(inner)), design[fit].T @ targets[: len(fit)])
    said, truth = design[held] @ weights, targets[len(fit) :]
    said, truth = said - said.mean(0, keepdims=True), truth - truth.mean(0, keepdims=True)
    power = np.sum(said**2, axis=0) * np.sum(truth**2, axis=0)
    return np.sum(said * truth, axis=0) ** 2 / np.where(power > 0, power, 1)
