"""A multilayer perceptron: of depth 0, softmax regression."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdistill import UserError
from jaxdistill.models.layers import LayerNorm, dropout

NORMS = ("none", "layer")
DTYPES = ("float32", "bfloat16")

# As in gpt2.py: first match wins; one rule serves a parameter, its moments and its EMA. Layers are cut on their outputs: as many inputs as
# the data have seldom divide. The head, which may read those, is whole everywhere.
SHARDING = ((r"block_\d+/kernel", jax.P(None, ("fsdp", "model"))),)
DECAY = r"kernel$"


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """The section `model.mlp`. hidden: widths of the layers, () for softmax regression. norm: none | layer. dropout, input_dropout: of
    what layers give, and of the inputs. dtype: float32 | bfloat16, of the computation; parameters, the head and logits are float32."""

    hidden: tuple = (64, 64)
    norm: str = "none"
    dropout: float = 0.0
    input_dropout: float = 0.0
    dtype: str = "float32"

    def __post_init__(self):
        if any(type(width) is not int or width < 1 for width in self.hidden):
            raise UserError(f"hidden: found {self.hidden!r}; accepted: whole numbers of at least 1, or () for softmax regression")
        check(self, norm=NORMS, dtype=DTYPES)
        if not 0 <= self.input_dropout < 1:
            raise UserError(f"input_dropout: found {self.input_dropout!r}; accepted: 0 or more, and below 1")


def check(config, **choices: tuple[str, ...]) -> None:
    """`UserError` for a choice that is none of these, and for a dropout that is no share below 1."""
    for key, accepted in choices.items():
        if getattr(config, key) not in accepted:
            raise UserError(f"{key}: found {getattr(config, key)!r}; accepted: {', '.join(accepted)}")
    if not 0 <= config.dropout < 1:
        raise UserError(f"dropout: found {config.dropout!r}; accepted: 0 or more, and below 1")


class MLP(nn.Module):
    """`len(hidden)` layers of Dense, normalisation, GELU and dropout, then the head."""

    classes: int
    config: MLPConfig = MLPConfig()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch inputs"], *, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "batch classes"], dict[str, Float[Array, "batch _"]]]:
        """(logits, features): "block_i", the output of each layer, and "final", what the head reads. key: with one, dropout is on."""
        c, features = self.config, {}
        dtype = jnp.dtype(c.dtype)
        drawn = lambda i: None if key is None else jax.random.fold_in(key, i)  # noqa: E731
        x = dropout(x.astype(dtype), c.input_dropout, drawn(len(c.hidden)))
        for i, width in enumerate(c.hidden):
            x = nn.Dense(width, dtype=dtype, name=f"block_{i}")(x)
            if c.norm == "layer":
                x = LayerNorm(1e-6, dtype, name=f"norm_{i}")(x)
            x = dropout(nn.gelu(x, approximate=False), c.dropout, drawn(i))
            features[f"block_{i}"] = x
        return nn.Dense(self.classes, name="head")(x.astype(jnp.float32)), features | {"final": x}
