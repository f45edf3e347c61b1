"""Kernel activation functions (KAF; Scardapane et al., Neural Networks 2019, arXiv 1707.04035): each neuron learns its own shape.

    f(s) = sum_i alpha_i exp(-gamma (s - d_i)^2),    d_i: points of a dictionary, uniform on [-bound, bound] and never trained

A sum over the dictionary, neuron by neuron: the kernel of a vector's norm is 0 in float32 from some 50 neurons on. Outside the
dictionary f is 0 and so is its gradient: put a normalisation in front or use the bypass, and watch `beyond`.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.special import erf

from jaxdistill import UserError


@dataclasses.dataclass(frozen=True)
class Preset:
    """size: points of the dictionary on [-bound, bound]. sharpness: gamma in units of 1 / spacing^2. ridge: of the fit to a target
    function. std: of random coefficients."""

    size: int
    bound: float
    sharpness: float
    ridge: float
    std: float

    @property
    def points(self) -> np.ndarray:
        """float64 [size]."""
        return np.linspace(-self.bound, self.bound, self.size)

    @property
    def gamma(self) -> float:
        return self.sharpness * ((self.size - 1) / (2 * self.bound)) ** 2


PRESETS = {  # of the paper, and of the two implementations of its authors (github.com/ispamm/kernel-activation-functions)
    "paper": Preset(20, 3.0, 1 / 6, 1e-6, 0.3),
    "torch": Preset(20, 4.0, 1 / 8, 1e-4, 0.8),
    "keras": Preset(20, 3.0, 1 / 8, 1e-5, 0.05),
}
TARGETS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": np.tanh,
    "elu": lambda s: np.where(s > 0, s, np.expm1(np.minimum(s, 0))),
    "gelu": lambda s: s * (1 + erf(s / np.sqrt(2))) / 2,
    "identity": lambda s: s,
}
INITS = (*TARGETS, "random")
GAMMAS = ("fixed", "trained")
STEPS = 32  # parts of a batch, each of which has its kernel values in memory at a time


@dataclasses.dataclass(frozen=True)
class KAFConfig:
    """The section `kaf`. preset: paper | torch | keras. init: the function that coefficients are fitted to, or random. gamma: one a
    neuron, fixed or trained. bypass: s times a trained weight is added, which begins at 1; coefficients are fitted to what it leaves."""

    preset: str = "paper"
    init: str = "elu"
    gamma: str = "fixed"
    bypass: bool = False

    def __post_init__(self):
        for key, accepted in (("preset", PRESETS), ("init", INITS), ("gamma", GAMMAS)):
            if getattr(self, key) not in list(accepted):
                raise UserError(f"config key kaf.{key}: found {getattr(self, key)!r}; accepted: {', '.join(accepted)}")

    def module(self, name: str | None = None) -> "KAF":
        return KAF(self.preset, self.init, self.gamma, self.bypass, name=name)


def ridge(preset: Preset, target: Callable[[np.ndarray], np.ndarray], dtype=np.float64) -> Float[np.ndarray, " size"]:
    """alpha = (K + ridge I)^-1 target(d): the kernel ridge fit at the points of the dictionary. In float64, as K's condition number is
    near 1e5: float32 moves coefficients by tenths."""
    points = preset.points
    kernel = np.exp(-preset.gamma * np.square(points[:, None] - points[None, :])) + preset.ridge * np.eye(preset.size)
    return np.linalg.solve(kernel.astype(dtype), target(points).astype(dtype))


def naive(
    s: Float[Array, "*batch units"], alpha: Float[Array, "size units"], gamma: Float[Array, " units"], points: tuple[float, ...]
) -> Float[Array, "*batch units"]:
    """The formula as it stands, which keeps [*batch, size, units] for its gradient: the reference of `kaf`."""
    column = (*[None] * (s.ndim - 1), slice(None), None)
    apart = s[..., None, :] - jnp.asarray(points, jnp.float32)[column]
    gamma, alpha = (jnp.expand_dims(x, tuple(range(s.ndim + 1 - x.ndim))) for x in (gamma, alpha))
    return jnp.sum(alpha * jnp.exp(-gamma * jnp.square(apart)), axis=-2)


def kaf(
    s: Float[Array, "*batch units"], alpha: Float[Array, "size units"], gamma: Float[Array, " units"], points: tuple[float, ...]
) -> Float[Array, "*batch units"]:
    """f of each neuron, float32, without ever holding [*batch, size, units]: forward and backward go through the batch in `STEPS`
    parts, and what is kept for the gradient is three arrays like s.

    points: of the dictionary, static. Gradients to s, alpha and gamma."""
    flat = s.astype(jnp.float32).reshape(-1, s.shape[-1])
    return _kaf(flat, alpha, gamma, points).reshape(s.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _kaf(s, alpha, gamma, points):
    """s: [rows, units]. Unrolled over the dictionary, so that kernel values stay in registers; alpha is [size, units], so that
    neurons lie side by side in every operand."""
    out = jnp.zeros_like(s)
    for coefficient, point in zip(alpha, points, strict=True):
        out = out + coefficient[None] * jnp.exp(-gamma[None] * jnp.square(s - point))
    return out


def _forward(s, alpha, gamma, points):
    def part(s):
        out = first = second = jnp.zeros_like(s)
        for coefficient, point in zip(alpha, points, strict=True):
            apart = s - point
            value = coefficient[None] * jnp.exp(-gamma[None] * jnp.square(apart))
            out, first, second = out + value, first + value * apart, second + value * jnp.square(apart)
        return out, first, second

    out, first, second = (_joined(x, len(s)) for x in jax.lax.map(part, _parts(s)))
    return out, (s, gamma, first, second)


def _backward(points, kept, pull):
    s, gamma, first, second = kept

    def part(sums, rows):
        s, pull = rows
        return [total + pull * jnp.exp(-gamma[None] * jnp.square(s - point)) for total, point in zip(sums, points, strict=True)], None

    parts = _parts(s), _parts(pull)  # (what fills the last part up has pull 0)
    sums, _ = jax.lax.scan(part, [jnp.zeros(parts[0].shape[1:])] * len(points), parts)
    to_alpha = jnp.stack([jnp.sum(total, axis=0) for total in sums])  # over rows only here: one sum over devices, none in the loop
    return -2 * gamma[None] * pull * first, to_alpha, -jnp.sum(pull * second, axis=0)


_kaf.defvjp(_forward, _backward)


def _parts(x):
    """[rows, units] -> [steps, rows / steps, units], strided: rows stay on their device where the batch is cut over devices."""
    steps = max(1, min(STEPS, len(x)))
    each = -(-len(x) // steps)
    return jnp.pad(x, ((0, each * steps - len(x)), (0, 0))).reshape(each, steps, -1).swapaxes(0, 1)


def _joined(parts, rows: int):
    """The inverse of `_parts`."""
    return parts.swapaxes(0, 1).reshape(-1, parts.shape[-1])[:rows]


def beyond(s: Float[Array, "*batch units"], bound: float) -> Bool[Array, "*batch units"]:
    """Inputs outside the dictionary, where f and its gradient soon are 0."""
    return jnp.abs(s) > bound


class KAF(nn.Module):
    """One KAF a neuron. start: of INITS. It computes in float32 and returns the dtype of its input.

    Parameters: alpha [size, units]; with trained gamma `rho` [units], gamma = softplus(rho) (so that it stays positive); with the
    bypass `bypass` [units]."""

    preset: str = "paper"
    start: str = "elu"
    gamma: str = "fixed"
    bypass: bool = False

    @property
    def bound(self) -> float:
        return PRESETS[self.preset].bound

    @nn.compact
    def __call__(self, s: Float[Array, "*batch units"]) -> Float[Array, "*batch units"]:
        preset, units = PRESETS[self.preset], s.shape[-1]
        alpha = self.param("alpha", self._alpha, (preset.size, units))
        gamma = jnp.full(units, preset.gamma, jnp.float32)
        if self.gamma == "trained":
            start = np.log(np.expm1(preset.gamma))
            gamma = jax.nn.softplus(self.param("rho", nn.initializers.constant(start), (units,)))
        out = kaf(s, alpha, gamma, tuple(preset.points.tolist()))
        if self.bypass:
            slope = self.param("bypass", nn.initializers.ones, (units,))
            out = out + jnp.expand_dims(slope, tuple(range(s.ndim - 1))) * s.astype(jnp.float32)
        return out.astype(s.dtype)

    def fitted(self) -> Float[np.ndarray, " size"]:
        """float64: what the coefficients of every neuron begin as; of random ones the mean, 0."""
        preset = PRESETS[self.preset]
        if self.start == "random":
            return np.zeros(preset.size)
        target = TARGETS[self.start]
        return ridge(preset, (lambda s: target(s) - s) if self.bypass else target)

    def _alpha(self, key, shape):
        noise = PRESETS[self.preset].std * jax.random.normal(key, shape) if self.start == "random" else jnp.zeros(shape)
        return noise + jnp.asarray(self.fitted(), jnp.float32)[:, None]


class KAF2D(nn.Module):
    """Channels i and i + n/2 go through one function of two variables: [..., n] -> [..., n / 2].

    f(s, t) = sum_ij alpha_ij exp(-gamma ((s - d_i)^2 + (t - d_j)^2)), d uniform on [-3, 3], gamma = 1 / (4 spacing^2), alpha from
    N(0, std^2). The kernel is a product, so that 2 x size values stand for size^2, and none is kept for the gradient."""

    size: int = 10
    bound: float = 3.0
    std: float = 0.3

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch half"]:
        if x.shape[-1] % 2:
            raise UserError(f"KAF2D: found {x.shape[-1]} channels; accepted: an even number")
        half = x.shape[-1] // 2
        alpha = self.param("alpha", nn.initializers.normal(self.std), (self.size, self.size, half))
        points = jnp.linspace(-self.bound, self.bound, self.size)
        gamma = ((self.size - 1) / (2 * self.bound)) ** 2 / 4

        @jax.checkpoint
        def surface(pairs, alpha):
            apart = pairs[:, :, None] - points[None, None, :, None]
            kernel = jnp.exp(-gamma * jnp.square(apart))
            return jnp.einsum("niu,iju,nju->nu", kernel[:, 0], alpha, kernel[:, 1], precision="highest")

        return surface(x.astype(jnp.float32).reshape(-1, 2, half), alpha).reshape(*x.shape[:-1], half).astype(x.dtype)
