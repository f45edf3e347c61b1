"""Rotary position embeddings (Su et al. 2021, "RoFormer") and the ways to stretch them that config.json files name.

A folder of transformers 5 says them in `rope_parameters`, an older one in `rope_theta` and `rope_scaling`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdistill import UserError

_STRETCHED = ("factor", "original_max_position_embeddings")
KINDS = {  # rope_type -> (entries it must have, entries it may have)
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": ((*_STRETCHED, "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (_STRETCHED, ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """`theta`: the base of the wavelengths. `entries`: of `kind`, in config.json's own names, sorted."""

    theta: float = 10000.0
    kind: str = "default"
    entries: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        if not self.theta > 1:
            raise UserError(f"rope_theta: found {self.theta!r}; accepted: a number above 1")
        if self.kind not in KINDS:
            raise UserError(f"rope_type: found {self.kind!r}; accepted: {', '.join(KINDS)}")
        needed, allowed = KINDS[self.kind]
        entries = dict(self.entries)
        for name in entries.keys() - {*needed, *allowed}:
            accepted = ", ".join((*needed, *allowed)) or "none"
            raise UserError(f"rope_parameters: found {name} with rope_type {self.kind}; accepted: {accepted}")
        for name in (*needed, *entries):
            value = entries.get(name, "nothing")
            good = isinstance(value, bool) if name == "truncate" else _number(value) and value > 0
            if not good:
                accepted = "true or false" if name == "truncate" else "a number above 0"
                raise UserError(f"rope_parameters: {name}: found {value!r}; accepted: {accepted}")
        if self.kind == "llama3" and entries["high_freq_factor"] <= entries["low_freq_factor"]:
            found = entries["high_freq_factor"]
            raise UserError(f"rope_parameters: high_freq_factor: found {found!r}; accepted: more than low_freq_factor")

    def to_hf(self) -> dict[str, Any]:
        """The entries of a config.json that transformers 4 (the first two) and 5 read."""
        scaling = {"rope_type": self.kind, **dict(self.entries)}
        return {
            "rope_theta": self.theta,
            "rope_scaling": None if self.kind == "default" else scaling,
            "rope_parameters": scaling | {"rope_theta": self.theta},
        }


def from_hf(raw: Mapping[str, Any], length: int) -> Rope:
    """The rope of a config.json. `length` stands for an `original_max_position_embeddings` that is not there."""
    entries = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(entries, dict):
        raise UserError(f"rope_parameters: found {entries!r}; accepted: an object")
    entries = {name: value for name, value in entries.items() if value is not None}
    old_kind = entries.pop("type", "default")  # its name before transformers 4.43
    kind, theta = entries.pop("rope_type", old_kind), entries.pop("rope_theta", raw.get("rope_theta", 10000.0))
    if not _number(theta):
        raise UserError(f"rope_theta: found {theta!r}; accepted: a number above 1")
    if not isinstance(kind, str):
        raise UserError(f"rope_type: found {kind!r}; accepted: {', '.join(KINDS)}")
    part = entries.pop("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise UserError(f"partial_rotary_factor: found {part!r}; accepted: 1.0")
    if kind in ("llama3", "yarn"):
        outside = raw.get("original_max_position_embeddings")  # transformers lets it win
        entries["original_max_position_embeddings"] = outside or entries.get("original_max_position_embeddings", length)
    return Rope(float(theta), kind, tuple(sorted(entries.items())))


def frequencies(rope: Rope, head_dim: int) -> tuple[Float[np.ndarray, "half"], float]:
    """Radians a position of each pair of a head's channels, and the factor of cosines and sines (attention's
    temperature, squared)."""
    e = dict(rope.entries)
    plain = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    scaled, attention = plain, 1.0
    if rope.kind == "linear":  # Chen et al. 2023
        scaled = plain / e["factor"]
    elif rope.kind == "llama3":  # Llama 3.1: long wavelengths stretched, short ones kept, a ramp between
        low, high = e["low_freq_factor"], e["high_freq_factor"]
        turns = e["original_max_position_embeddings"] * plain / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        scaled = kept * plain + (1 - kept) * plain / e["factor"]
    elif rope.kind == "yarn":  # Peng et al. 2023
        scaled, attention = _yarn(e, plain, rope.theta, head_dim)
    # dynamic (NTK) changes nothing up to max_position_embeddings, and longer rows are refused.
    return scaled.astype(np.float32), float(attention)


def _yarn(e: dict, plain, theta: float, head_dim: int):
    def channel(turns):  # the pair of channels that turns so often in the original context
        return head_dim * math.log(e["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def mscale(weight):
        return 1.0 if e["factor"] <= 1 else 0.1 * weight * math.log(e["factor"]) + 1.0

    low, high = channel(e.get("beta_fast", 32)), channel(e.get("beta_slow", 1))
    if e.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 * (low == high)
    stretched = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    scaled = stretched * plain / e["factor"] + (1 - stretched) * plain
    attention = mscale(1)
    if "mscale" in e and "mscale_all_dim" in e:
        attention = mscale(e["mscale"]) / mscale(e["mscale_all_dim"])
    return scaled, e.get("attention_factor", attention)


def angles(rope: Rope, head_dim: int, positions: Int[Array, "batch time"]) -> tuple[Float[Array, "batch time 1 half"], ...]:
    """Cosines and sines for `rotate`, in float32: bfloat16 cannot count positions above 256."""
    rates, attention = frequencies(rope, head_dim)
    turned = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(rates)[None, None, None]
    return attention * jnp.cos(turned), attention * jnp.sin(turned)


def rotate(
    x: Float[Array, "batch time heads channels"], cos: Float[Array, "#batch time 1 half"], sin: Float[Array, "#batch time 1 half"]
) -> Float[Array, "batch time heads channels"]:
    """Channel i and i + channels/2 are a pair (as in transformers; Meta's own files pair neighbours)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
