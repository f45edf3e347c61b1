"""The insides of two models, compared: what each feature term of student-aware distillation needs of both.

Every term is a method: from the features of the two models, as their modules return them (the teacher's under stop_gradient,
and at the student's places where tokenizers differ), to (a value for each token, arrays with a leading example axis for what is
a function of the whole batch, probes). The trained maps between the models live here; none of them is deployed.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdistill import UserError
from jaxdistill.losses.attention import attention_kl
from jaxdistill.losses.contrastive import mean_pool
from jaxdistill.losses.hidden import DISTANCES, layer_map, rms_distance, rms_normalised
from jaxdistill.models.projector import KINDS, HeadMap, LayerProjectors, Projector
from jaxdistill.models.router import Router

OFF = ((0.0, 0.0),)


@dataclasses.dataclass(frozen=True)
class HiddenConfig:
    """The section `hidden`. projector: of each student block into the teacher's space. balance: weight, inside the term, of
    what keeps the learned layer weights from drifting to the easiest layer."""

    weight: Any = OFF
    distance: str = "rms"
    projector: str = "linear"
    balance: float = 0.01

    def __post_init__(self):
        for key, accepted in (("distance", DISTANCES), ("projector", KINDS)):
            if getattr(self, key) not in list(accepted):
                raise UserError(f"config key hidden.{key}: found {getattr(self, key)!r}; accepted: {', '.join(accepted)}")
        _above_0("hidden.balance", self.balance)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The section `attention`."""

    weight: Any = OFF


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """The section `contrastive`. temperature: tau of InfoNCE."""

    weight: Any = OFF
    temperature: float = 0.07

    def __post_init__(self):
        _above_0("contrastive.temperature", self.temperature)


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """The section `router`. k, temperature: ramps. balance: weight of the load balance inside the term."""

    weight: Any = OFF
    k: Any = ((0.0, 1.0), (1.0, 4.0))
    temperature: Any = ((0.0, 1.0), (1.0, 0.1))
    balance: float = 0.01
    lr_mult: float = 2.0

    def __post_init__(self):
        _above_0("router.balance", self.balance)
        _above_0("router.lr_mult", self.lr_mult)


def _above_0(key: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"config key {key}: found {value}; accepted: a number above 0")


CONFIGS = {"hidden": HiddenConfig, "attention": AttentionConfig, "contrastive": ContrastiveConfig, "router": RouterConfig}


class Matching(nn.Module):
    """terms: those of CONFIGS that have parameters here. depth, heads: the student's; teacher_depth, width: the teacher's.
    distance, kind: of `hidden` (losses.hidden.DISTANCES, models.projector.KINDS). experts: names of the teacher's features
    "experts_i" that are routed over beside its blocks. attend: whether the two models' attention rows have the same keys."""

    terms: tuple[str, ...]
    depth: int
    teacher_depth: int
    width: int
    heads: int
    distance: str = "rms"
    kind: str = "linear"
    experts: tuple[str, ...] = ()
    attend: bool = True
    dtype: Any = jnp.float32

    def setup(self):
        if "hidden" in self.terms:
            self.layers = LayerProjectors(self.depth, self.width, self.kind, self.dtype)
        if "attention" in self.terms:
            self.head_maps = [HeadMap(self.heads) for _ in range(self.depth)]
        if "contrastive" in self.terms:
            self.pooled = Projector(self.width, dtype=self.dtype)
        if "router" in self.terms:
            self.router_into = Projector(self.width, dtype=self.dtype)
            self.router_scores = Router(dtype=self.dtype)

    def __call__(self, student: dict, teacher: dict, valid: Bool[Array, "batch time"]) -> None:
        """Touches every parameter: for `init`."""
        for name in self.terms:
            if name == "router":
                self.router(student, teacher, valid, k=1.0, temperature=1.0)
            else:
                getattr(self, name)(student, teacher, valid)

    def hidden(self, student: dict, teacher: dict, valid: Bool[Array, "batch time"]) -> tuple[Float[Array, "batch time"], dict, dict]:
        """Distance of each student block, projected, to the teacher's block of `layer_map`; their weighted sum."""
        projected, weights = self.layers([student[f"block_{s}"] for s in range(self.depth)])
        pairs = zip(projected, layer_map(self.depth, self.teacher_depth), strict=True)
        distances = [DISTANCES[self.distance](ours, teacher[f"block_{t}"], where=valid) for ours, t in pairs]
        return jnp.einsum("l,lbt->bt", weights, jnp.stack(distances)), {}, {"hidden/layer_entropy": _of_one(_entropy(weights))}

    def layer_balance(self) -> Float[Array, ""]:
        """Mean squared distance of the layer weights from equal ones: left alone they drift to the easiest layer."""
        scores = self.variables["params"]["layers"].get("scores", jnp.zeros(1))
        return jnp.mean((jax.nn.softmax(scores) - 1 / self.depth) ** 2)

    def attention(self, student: dict, teacher: dict, valid: Bool[Array, "batch time"]) -> tuple[Float[Array, "batch time"], dict, dict]:
        """KL of the teacher's attention rows to the student's, mean over the student's blocks."""
        total, spread = 0.0, 0.0
        for s, t in enumerate(layer_map(self.depth, self.teacher_depth)):
            rows, weights = self.head_maps[s](teacher[f"attention_{t}"])
            total = total + attention_kl(rows, student[f"attention_{s}"], where=valid)
            spread = spread + jnp.mean(_entropy(weights))
        return total / self.depth, {}, {"attention/head_entropy": _of_one(spread / self.depth)}

    def contrastive(self, student: dict, teacher: dict, valid: Bool[Array, "batch time"]) -> tuple[None, dict, dict]:
        """Examples as vectors, for `info_nce` over the global batch: the student's projected, the teacher's as they are."""
        ours = self.pooled(mean_pool(student["final"], valid)).astype(jnp.float32)
        return None, {"student_pool": ours, "teacher_pool": mean_pool(teacher["final"], valid)}, {}

    def router(
        self, student: dict, teacher: dict, valid: Bool[Array, "batch time"], *, k: Any, temperature: Any, key: Any = None
    ) -> tuple[Float[Array, "batch time"], dict, dict]:
        """Distance of the student's final state, projected, to the mix of teacher features that is routed to each token, and
        of its attention rows (heads averaged) to the same mix of the teacher's."""
        features = jnp.stack([teacher[f"block_{t}"] for t in range(self.teacher_depth)], axis=2)
        features = jnp.concatenate([features, *(teacher[name] for name in self.experts)], axis=2).astype(jnp.float32)
        # Each of size 1: states grow with depth, and a mix of raw ones would be the last block's.
        features = rms_normalised(jnp.where(valid[..., None, None], features, 1.0))
        projected = self.router_into(student["final"])
        weights, probabilities = self.router_scores(student["final"], projected, features, k=k, temperature=temperature, key=key)
        routed = jnp.einsum("bte,bted->btd", weights, features)
        values = rms_distance(projected, routed, where=valid)
        if self.attend:
            of_block = list(range(self.teacher_depth))
            for name in self.experts:
                of_block += [int(name.split("_")[1])] * teacher[name].shape[2]
            rows = jnp.stack([jnp.mean(teacher[f"attention_{t}"], axis=1) for t in range(self.teacher_depth)], axis=1)
            rows = jnp.einsum("bte,betk->btk", weights, rows[:, jnp.asarray(of_block)])[:, None]
            ours = jnp.mean(student[f"attention_{self.depth - 1}"], axis=1)[:, None]
            values = values + attention_kl(rows, ours, where=valid)
        count = jnp.sum(valid, dtype=jnp.float32)
        over = lambda x: (jnp.sum(jnp.where(valid, x, 0.0)), count)  # noqa: E731
        middle = jnp.sum(jnp.where(valid[..., None], routed, 0.0), axis=(0, 1)) / jnp.maximum(count, 1.0)
        variance = jnp.mean((routed - middle[None, None]) ** 2, axis=-1)
        probes = {"router/entropy": over(_entropy(probabilities)), "router/target_variance": over(variance)}
        probes |= {f"router/load_{e}": over(weights[..., e]) for e in range(weights.shape[-1])}
        return values, {"routing": jnp.sum(jnp.where(valid[..., None], probabilities, 0.0), axis=1)}, probes


def load_balance(summed: Float[Array, "batch features"], count: Float[Array, " batch"]) -> Float[Array, ""]:
    """Mean squared distance of the mean routing from 1/E: 0 iff all E features are used alike, or there is no token."""
    mean = jnp.sum(summed, axis=0) / jnp.maximum(jnp.sum(count), 1.0)
    return jnp.where(jnp.sum(count) > 0, jnp.mean((mean - 1 / summed.shape[1]) ** 2), 0.0)


def _entropy(probabilities: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    """In nats."""
    return -jnp.sum(jax.scipy.special.xlogy(probabilities, probabilities), axis=-1)


def _of_one(value):
    return value, jnp.ones((), jnp.float32)
