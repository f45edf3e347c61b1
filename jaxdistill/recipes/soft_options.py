"""The options of soft_label: each remedy against collapse, checked for itself, and against what the training targets can be.

Two of them can make the targets unreachable, whatever the model: an entropy floor above what the targets themselves have, and logits that
are too short for the largest probability that is asked. Both are refused with the numbers. The bound is exact: of all logits no longer
than R, those of which one stands against all others evenly have the largest probability, 1 / (1 + (K - 1) exp(-R sqrt(K / (K - 1)))).
"""

import dataclasses
import logging
import math

import jax.numpy as jnp
import numpy as np

from jaxdistill import UserError
from jaxdistill.losses import classification, regularisation
from jaxdistill.recipes.options import Needs

logger = logging.getLogger(__name__)

NEEDS = (
    Needs("soft.entropy_weight", (), ("soft.entropy_floor", "soft.entropy_kind")),
    Needs("soft.margin_weight", (), ("soft.margin",)),
    Needs("soft.class_weights", ("effective",), ("soft.beta",)),
)


@dataclasses.dataclass(frozen=True)
class SoftConfig:
    """The section `soft`: each option at "off" by default."""

    smoothing: float = 0.0  # a: the target is (1 - a) t + a / K, which moves the optimum there
    temperature: float = 1.0  # divides the logits in training: a re-parametrisation, unless they are bounded
    temperature_inference: float = 1.0  # divides the deployed logits
    norm_cap: float = 0.0  # logits of a greater length are shortened to it, in training and deployed; 0: off
    logit_norm: float = 0.0  # LogitNorm: logits are z / (this |z|), in training and deployed; 0: off
    entropy_weight: float = 0.0  # of max(0, floor - H(p)), or of its square
    entropy_floor: float = 0.0  # nats
    entropy_kind: str = "linear"  # linear | quadratic
    confidence_weight: float = 0.0  # of log K - H(p)
    max_suppression: float = 0.0  # weight of max z - mean z
    margin_weight: float = 0.0  # of sum_k max(0, max z - z_k - margin)
    margin: float = 0.0
    focal: float = 0.0  # gamma; the loss is then sum_k t_k (1 - p_k)^gamma (-log p_k)
    class_weights: str = "none"  # none | inverse | effective; an example is weighted by what its target gives each class
    beta: float = 0.999  # of effective
    mixup: float = 0.0  # rows are mixed with others by Beta(this, this); of tables
    final_decay: float = 0.0  # weight decay of the last layer, beyond optimizer.weight_decay
    standardise: bool = True  # inputs by mean and deviation of the training split
    guards: bool = True  # refuse what makes the target unreachable; False: warn
    figures: bool = True  # reliability, and entropy against spread, of the test

    def __post_init__(self):
        for key, accepted in (("entropy_kind", regularisation.KINDS), ("class_weights", classification.WEIGHTS)):
            if getattr(self, key) not in accepted:
                self.refuse(key, ", ".join(accepted))
        for field in dataclasses.fields(self):
            value, below = getattr(self, field.name), 1 if field.name in ("smoothing", "beta") else math.inf
            if field.type is float and not 0 <= value < below:
                self.refuse(field.name, "0 or more" + (", and below 1" if below == 1 else ""))
        for key in ("temperature", "temperature_inference"):
            if not getattr(self, key):
                self.refuse(key, "more than 0")
        if self.entropy_weight and not self.entropy_floor:
            self.refuse("entropy_weight", "0, or a soft.entropy_floor above 0")
        if self.logit_norm and (self.norm_cap or {self.temperature, self.temperature_inference} != {1.0}):
            self.refuse("logit_norm", "0 with a norm_cap or another temperature: its own is all that it has")

    def refuse(self, key: str, accepted: str):
        raise UserError(f"config key soft.{key}: found {getattr(self, key)!r}; accepted: {accepted}")

    def bounded(self, logits):
        """Logits as they are trained and deployed, before the temperature."""
        if self.logit_norm:
            return regularisation.logit_norm(logits, self.logit_norm)
        if not self.norm_cap:
            return logits
        length = jnp.sqrt(jnp.sum(jnp.square(logits), axis=-1, keepdims=True) + 1e-12)
        return logits * jnp.minimum(1.0, self.norm_cap / length)

    def guard(self, target: np.ndarray) -> None:
        """What makes these training targets, float64 [N, K], unreachable: an error, or without guards a warning."""
        for line in (*self._punished(target), *self._out_of_reach(target)):
            if self.guards:
                raise UserError(f"config key soft.{line}, or soft.guards False")
            logger.warning("soft.guards is off: soft.%s", line)

    def reach(self, target: np.ndarray) -> dict | None:
        """What the bounds leave of these targets, float64 [N, K]; None without bounds. largest: the largest probability that training
        logits can give; target: the 99th percentile of what is asked. floor: of the entropy; target_entropy: the 5th percentile."""
        classes, length = target.shape[1], 1 / self.logit_norm if self.logit_norm else self.norm_cap / self.temperature
        if not length and not self.entropy_weight:
            return None
        entropy = -np.sum(target * np.log(np.where(target > 0, target, 1)), axis=1)
        return {"largest": regularisation.largest_probability(length, classes) if length else 1.0,
                "target": float(np.percentile(target.max(1), 99)), "floor": self.entropy_floor if self.entropy_weight else 0.0,
                "target_entropy": float(np.percentile(entropy, 5))}  # fmt: skip

    def _punished(self, target: np.ndarray):
        least = float(np.percentile(-np.sum(target * np.log(np.where(target > 0, target, 1)), axis=1), 5))
        if self.entropy_weight and self.entropy_floor > least:
            yield (f"entropy_floor: found {self.entropy_floor:g}, above {least:.3f}, the 5th percentile of the entropy of the training "
                   f"targets: right predictions would be punished; accepted: {least:.3f} or less")  # fmt: skip

    def _out_of_reach(self, target: np.ndarray):
        classes, most = target.shape[1], float(np.percentile(target.max(1), 99))
        odds = math.log((classes - 1) * most / (1 - most)) if most < 1 else math.inf  # of the largest against another, which it takes
        needed = odds * math.sqrt((classes - 1) / classes)  # length of such logits
        asked = f"where 1 % of the training targets have {most:.3f} or more"
        bounds = {"temperature": self.temperature, "temperature_inference": self.temperature_inference} if self.norm_cap else {}
        for key, t in bounds.items():
            if (reach := regularisation.largest_probability(self.norm_cap / t, classes)) < most:
                yield (f"norm_cap: found {self.norm_cap:g} at soft.{key} {t:g}, with which no probability can be above {reach:.3f}, "
                       f"{asked}; accepted: 0, or {needed * t:.3g} or more")  # fmt: skip
        if self.logit_norm and (reach := regularisation.largest_probability(1 / self.logit_norm, classes)) < most:
            yield (f"logit_norm: found {self.logit_norm:g}, with which no probability can be above {reach:.3f}, {asked}; "
                   f"accepted: 0, or {1 / needed:.3g} or less")  # fmt: skip
