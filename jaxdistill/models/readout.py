"""From a sequence of states to classes: representation learning over time, then a Maxout readout with learned activations.

    statistics, convolutions, attention pooling -> concatenated -> norm
    -> Linear -> Maxout -> norm -> dropout -> Linear -> activation -> norm -> dropout -> Linear(classes)

Every norm is over features. Nothing looks at other examples, so that f(batch)[i] == f(x_i), in training too.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdistill import UserError
from jaxdistill.models.kaf import KAF2D, KAFConfig, beyond
from jaxdistill.models.layers import dropout
from jaxdistill.models.reservoir import Reservoir, ReservoirConfig

DECAY = r"kernel$"  # matrices and filters
SHARDING = ((r"maxout/linear/kernel$", jax.P("fsdp", "model")), (r"maxout/linear/bias$", jax.P("model")))
PARTS = ("statistics", "convolution", "attention")
STATISTICS = ("mean", "max", "std", "min", "step")
ACTIVATIONS = {"relu": nn.relu, "elu": nn.elu, "gelu": functools.partial(nn.gelu, approximate=False)}


@dataclasses.dataclass(frozen=True)
class ReadoutConfig:
    """The section `readout`. parts: of the representation. statistics: which of them, of each unit over time. standardise: the
    statistics, by their means and deviations over the training split. filters: of each kernel size in `kernels`. pooling: units that
    score frames. hidden: of Maxout, each the largest of `pieces` linear ones. width: of the layer with the activation (kaf2d: its
    input). activation: kaf | kaf2d | relu | elu | gelu. norm: LayerNorm where the module says; front: one before the activation too.
    dropout: of the two hidden layers."""

    parts: tuple = PARTS
    statistics: tuple = STATISTICS[:3]
    standardise: bool = False
    kernels: tuple = (3, 5, 7)
    filters: int = 64
    pooling: int = 64
    hidden: int = 512
    pieces: int = 5
    width: int = 256
    activation: str = "kaf"
    norm: bool = True
    front: bool = False
    dropout: tuple = (0.3, 0.2)

    def __post_init__(self):
        def refuse(key, accepted):
            raise UserError(f"config key readout.{key}: found {getattr(self, key)!r}; accepted: {accepted}")

        for key in ("filters", "pooling", "hidden", "pieces", "width"):
            if getattr(self, key) < 1:
                refuse(key, "1 or more")
        if not self.parts or len(set(self.parts)) < len(self.parts) or not set(self.parts) <= set(PARTS):
            refuse("parts", f"some of {', '.join(PARTS)}, each once")
        if not self.statistics or len(set(self.statistics)) < len(self.statistics) or not set(self.statistics) <= set(STATISTICS):
            refuse("statistics", f"some of {', '.join(STATISTICS)}, each once")
        if "statistics" not in self.parts:
            for key in ("statistics", "standardise"):
                if getattr(self, key) != getattr(ReadoutConfig, key):
                    refuse(key, f"{getattr(ReadoutConfig, key)!r} without 'statistics' in readout.parts")
        if not self.kernels or any(type(size) is not int or size < 1 or size % 2 == 0 for size in self.kernels):
            refuse("kernels", "odd whole numbers, as in (3, 5, 7)")
        if self.activation not in ("kaf", "kaf2d", *ACTIVATIONS):
            refuse("activation", f"kaf, kaf2d, {', '.join(ACTIVATIONS)}")
        if self.activation == "kaf2d" and self.width % 2:
            refuse("width", "an even number with readout.activation 'kaf2d'")
        if len(self.dropout) != 2 or not all(isinstance(rate, (int, float)) and 0 <= rate < 1 for rate in self.dropout):
            refuse("dropout", "two rates, each 0 or more and below 1")


def largest(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """The maximum along an axis; its gradient goes to the first that is largest.

    That of jnp.max goes where x equals the maximum. Compiled, x may be computed twice, once for either side, and be rounded otherwise:
    nothing is then equal, and the gradient is lost without a word (seen behind `Reservoir`, on CPU)."""
    at = jnp.expand_dims(jnp.argmax(x, axis=axis), axis)
    chosen = jax.lax.broadcasted_iota(at.dtype, x.shape, axis % x.ndim) == at
    return jnp.sum(jnp.where(chosen, x, 0), axis=axis)


def statistics(
    x: Float[Array, "batch time width"], where: Bool[Array, "batch time"], kinds: tuple[str, ...] = STATISTICS[:3]
) -> Float[Array, "batch kinds_width"]:
    """Over the frames that count, of which there is one at least: mean, max, std (of the population), min, and step, the mean of the
    absolute differences between a frame and the next.

    Where a channel is constant, as in a sequence of one frame, the deviation and its gradient are 0; so is the step."""
    counts = where[..., None]
    number = jnp.sum(counts, axis=1, dtype=x.dtype)

    def mean(values, counts, number):
        return jnp.sum(jnp.where(counts, values, 0), axis=1) / number

    def deviation():
        variance = mean(jnp.square(x - centre[:, None]), counts, number)
        varies = variance > 0  # (asked twice: the root's infinite slope must not even be multiplied by 0)
        return jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1)), 0)

    centre = mean(x, counts, number)
    found = {
        "mean": lambda: centre,
        "max": lambda: largest(jnp.where(counts, x, -jnp.inf), axis=1),
        "std": deviation,
        "min": lambda: -largest(jnp.where(counts, -x, -jnp.inf), axis=1),
        "step": lambda: mean(jnp.abs(x[:, 1:] - x[:, :-1]), counts[:, 1:], jnp.maximum(number - 1, 1)),
    }
    return jnp.concatenate([found[kind]() for kind in kinds], axis=-1)


class Representation(nn.Module):
    """States [batch, time, width] -> one vector an example. Frames from `length` on count for nothing.

    With config.standardise the collection "constants" holds mean and std of the statistics; "statistics" of the features, as they are
    before, is what they are fitted to."""

    config: ReadoutConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, states: Float[Array, "batch time width"], length: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch features"], dict[str, Array]]:
        c, features, found = self.config, {}, []
        where = jnp.arange(states.shape[1])[None] < length[:, None]
        x = jnp.where(where[..., None], states, 0).astype(self.dtype)
        if "statistics" in c.parts:
            y = features["statistics"] = statistics(x.astype(jnp.float32), where, c.statistics)
            if c.standardise:
                began = {"mean": jnp.zeros, "std": jnp.ones}
                mean, std = (self.variable("constants", name, fill, y.shape[-1]).value for name, fill in began.items())
                y = (y - mean[None]) / std[None]
            found.append(y)
        if "convolution" in c.parts:
            for size in c.kernels:
                y = nn.relu(nn.Conv(c.filters, (size,), padding="SAME", dtype=self.dtype, name=f"conv_{size}")(x))
                found.append(largest(jnp.where(where[..., None], y, 0), axis=1).astype(jnp.float32))  # (relu: 0 is the least)
        if "attention" in c.parts:
            scores = nn.tanh(nn.Dense(c.pooling, dtype=self.dtype, name="attention")(x))
            scores = nn.Dense(1, use_bias=False, dtype=self.dtype, name="score")(scores)[..., 0].astype(jnp.float32)
            weights = jax.nn.softmax(jnp.where(where, scores, -jnp.inf), axis=-1)
            features["attention"] = weights
            found.append(jnp.einsum("bt,btw->bw", weights, x.astype(jnp.float32)))
        out = jnp.concatenate(found, axis=-1)
        return nn.LayerNorm(name="norm")(out) if c.norm else out, features


class Maxout(nn.Module):
    """The largest of `pieces` linear functions for each unit (Goodfellow et al., arXiv 1302.4389)."""

    units: int
    pieces: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch units"]:
        y = nn.Dense(self.units * self.pieces, dtype=self.dtype, name="linear")(x)
        return largest(y.reshape(len(x), self.pieces, self.units), axis=1)


class Readout(nn.Module):
    """A vector an example -> logits (float32)."""

    config: ReadoutConfig
    kaf: KAFConfig
    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch width"], *, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "batch classes"], dict[str, Array]]:
        c, features = self.config, {}
        keys = (None, None) if key is None else jax.random.split(key)
        norm = lambda name, x: nn.LayerNorm(dtype=self.dtype, name=name)(x)  # noqa: E731
        y = Maxout(c.hidden, c.pieces, self.dtype, name="maxout")(x.astype(self.dtype))
        y = dropout(norm("norm_1", y) if c.norm else y, c.dropout[0], keys[0])
        s = nn.Dense(c.width, dtype=self.dtype, name="linear")(y)
        s = features["preactivation"] = norm("norm_front", s) if c.front else s
        if c.activation in ("kaf", "kaf2d"):
            learned = self.kaf.module("kaf") if c.activation == "kaf" else KAF2D(name="kaf")
            features["beyond"] = jnp.mean(beyond(s, learned.bound), axis=-1, dtype=jnp.float32)
            y = learned(s)
        else:
            y = ACTIVATIONS[c.activation](s)
        y = dropout(norm("norm_2", y) if c.norm else y, c.dropout[1], keys[1])
        features["final"] = y
        return nn.Dense(self.classes, name="out")(y.astype(jnp.float32)), features


class ReservoirClassifier(nn.Module):
    """Reservoir -> representation -> readout. apply({"params", "constants"}, x, length, key=) -> (logits, features).

    features: "states" [batch, time, width], "statistics" [batch, kinds x width] (not standardised), "representation" [batch, features],
    "attention" [batch, time] (weights of frames), "preactivation" [batch, width] (what the activation sees), "beyond" [batch] (its share
    outside the KAF's dictionary), "final"."""

    reservoir: ReservoirConfig
    readout: ReadoutConfig
    kaf: KAFConfig
    classes: int
    seed: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time inputs"], length: Int[Array, " batch"], *, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "batch classes"], dict[str, Array]]:
        states = Reservoir(self.reservoir, self.seed, self.dtype, name="reservoir")(x, length)
        vector, features = Representation(self.readout, self.dtype, name="representation")(states, length)
        logits, more = Readout(self.readout, self.kaf, self.classes, self.dtype, name="readout")(vector, key=key)
        return logits, features | more | {"states": states, "representation": vector}
