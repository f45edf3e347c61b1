"""A transformer over star graphs: one target node, and neighbours that are joined to it and not to each other.

Attention is that of Shi et al. (arXiv 2009.03509) and Ying et al. (Graphormer, arXiv 2106.05234) on a star: the target attends to
itself and to all neighbours, a neighbour to itself and to the target, and the features of the edge enter both as a bias on the score of
each head and as a part of what is read. Neighbours have no order: permuting them permutes their states and leaves the logits alone.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxdistill import UserError
from jaxdistill.models.layers import LayerNorm, dropout
from jaxdistill.models.mlp import DTYPES, check

SHARDING = (
    (r"(attention/(query|key|value|edge_value)|mlp/up)/kernel", jax.P("fsdp", "model")),  # column-parallel
    (r"(attention/out|mlp/down)/kernel", jax.P("model", "fsdp")),  # row-parallel
    (r"embed/(target|neighbour|edge)/kernel", jax.P(None, ("fsdp", "model"))),
    (r"head/kernel", jax.P("fsdp", None)),
)
DECAY = r"kernel$"
MASKED = -1e30  # a score, finite: a row of nothing but -inf has a softmax of NaN

Nodes = tuple[Float[Array, "batch width"], Float[Array, "batch neighbours width"]]


@dataclasses.dataclass(frozen=True)
class GraphConfig:
    """The section `model.graph`. width: of the states, a multiple of `heads`; the MLP's is `inner` x width. depth: blocks. dtype:
    float32 | bfloat16, of the computation; parameters, and the head with its logits, are float32."""

    width: int = 64
    depth: int = 2
    heads: int = 4
    inner: int = 2
    dropout: float = 0.0
    dtype: str = "float32"

    def __post_init__(self):
        for key in ("width", "depth", "heads", "inner"):
            if type(getattr(self, key)) is not int or getattr(self, key) < 1:
                raise UserError(f"{key}: found {getattr(self, key)!r}; accepted: an integer of at least 1")
        if self.width % self.heads:
            raise UserError(f"heads: found {self.heads}; accepted: a divisor of width ({self.width})")
        check(self, dtype=DTYPES)


class GraphTransformer(nn.Module):
    """Pre-LayerNorm blocks with residuals over (target, neighbours)."""

    classes: int
    config: GraphConfig = GraphConfig()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch inputs"],
        neighbours: Float[Array, "batch neighbours inputs"],
        edges: Float[Array, "batch neighbours edge"],
        mask: Bool[Array, "batch neighbours"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch classes"], dict[str, Float[Array, "..."]]]:
        """Class logits (float32) of the target node, and every intermediate.

        Args:
          mask: the neighbours that there are; what stands in the place of the others changes nothing. A target may have none.
          key: with one, dropout is on.

        Returns:
          logits, and features: "embed" and "block_i", states of the target [batch, width]; "neighbours", those of the
          neighbours after the last block that they pass [batch, neighbours, width], 0 where there is none; "attention_i", what the target
          attends to in block i, the head mean, itself first [batch, 1 + neighbours], float32, rows summing to 1; "final", what the head
          reads.
        """
        neighbours, edges = (jnp.where(mask[..., None], each, 0.0) for each in (neighbours, edges))  # padding may hold NaN
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        nodes, edges = Embed(c.width, dtype, name="embed")(x, neighbours, edges)
        features = {"embed": nodes[0]}
        for i in range(c.depth):
            block = Block(c.heads, c.inner, c.dropout, i + 1 == c.depth, dtype, name=f"block_{i}")
            nodes, attention = block(nodes, edges, mask, None if key is None else jax.random.fold_in(key, i))
            features |= {f"block_{i}": nodes[0], f"attention_{i}": attention}
        features["neighbours"] = jnp.where(mask[..., None], nodes[1], jnp.zeros((), dtype))
        final = LayerNorm(1e-6, dtype, name="ln_f")(nodes[0])
        return nn.Dense(self.classes, name="head")(final.astype(jnp.float32)), features | {"final": final}


class Embed(nn.Module):
    """Target, neighbours and edges into states of one width; a neighbour's begins with its edge."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x, neighbours, edges) -> tuple[Nodes, Float[Array, "batch neighbours width"]]:
        edges = nn.gelu(dense(edges, self.width, self.dtype, "edge"), approximate=False)
        target = dense(x, self.width, self.dtype, "target")
        return (target, dense(neighbours, self.width, self.dtype, "neighbour") + edges), edges


class Block(nn.Module):
    """Attention over the star, then an MLP, on target and neighbours alike. last: no head reads the neighbours any more, and only the
    target goes on."""

    heads: int
    inner: int
    rate: float
    last: bool
    dtype: Any

    @nn.compact
    def __call__(self, nodes, edges, mask, key) -> tuple[Nodes, Float[Array, "batch places"]]:
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        width = nodes[0].shape[-1]
        normed, passing = LayerNorm(1e-6, self.dtype, name="ln_1"), nodes[:1] if self.last else nodes
        read, attention = StarAttention(self.heads, self.last, self.dtype, name="attention")(tuple(map(normed, nodes)), edges, mask)
        passing = [state + dropout(out, self.rate, drawn) for state, out, drawn in zip(passing, read, keys[:2], strict=False)]
        ln_2, mlp = LayerNorm(1e-6, self.dtype, name="ln_2"), MLP(self.inner * width, self.dtype, name="mlp")
        passing = [state + dropout(mlp(ln_2(state)), self.rate, drawn) for state, drawn in zip(passing, keys[2:], strict=False)]
        return (passing[0], nodes[1] if self.last else passing[1]), attention


class MLP(nn.Module):
    inner: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        up, down = (nn.Dense(features, dtype=self.dtype, name=name) for features, name in ((self.inner, "up"), (x.shape[-1], "down")))
        return by_rows(lambda rows: down(nn.gelu(up(rows), approximate=False)), x)


class StarAttention(nn.Module):
    """Multi-head attention along the edges of a star and of each node to itself. last: of the target alone."""

    heads: int
    last: bool
    dtype: Any

    @nn.compact
    def __call__(self, nodes: Nodes, edges, mask) -> tuple[tuple[Array, ...], Float[Array, "batch places"]]:
        width = nodes[0].shape[-1]
        # (A bias of the keys would move all scores of a query alike, which the softmax does not see.)
        layers = {name: nn.Dense(width, use_bias=name != "key", dtype=self.dtype, name=name) for name in ("query", "key", "value", "out")}
        split = lambda x: x.reshape(*x.shape[:-1], self.heads, width // self.heads)  # noqa: E731
        see = lambda name, x: split(by_rows(layers[name], x))  # noqa: E731
        scale = (width // self.heads) ** -0.5
        ways = 1 if self.last else 2  # what the target attends by, and what the neighbours do
        towards, *away = jnp.split(dense(edges, ways * self.heads, self.dtype, "edge_bias").astype(jnp.float32), ways, axis=-1)
        along = split(dense(edges, width, self.dtype, "edge_value", use_bias=False))
        (k0, k), (v0, v) = ((see(name, nodes[0]), see(name, nodes[1])) for name in ("key", "value"))

        def score(pattern, a, b):
            return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32) * scale

        q0 = see("query", nodes[0])
        others = jnp.where(mask[..., None], score("bhd,bnhd->bnh", q0, k) + towards, MASKED)
        own = score("bhd,bhd->bh", q0, k0)[:, None]
        p = jax.nn.softmax(jnp.concatenate([own, others], axis=1), axis=1)
        read = p[:, 0, :, None].astype(self.dtype) * v0 + jnp.einsum("bnh,bnhd->bhd", p[:, 1:].astype(self.dtype), v + along)
        outputs = (read,)
        if not self.last:
            q = see("query", nodes[1])
            p_target = jax.nn.sigmoid(score("bnhd,bhd->bnh", q, k0) + away[0] - score("bnhd,bnhd->bnh", q, k))  # softmax over two
            p_target = p_target[..., None].astype(self.dtype)
            outputs += ((1 - p_target) * v + p_target * (v0[:, None] + along),)
        outputs = tuple(by_rows(layers["out"], x.reshape(*x.shape[:-2], width)) for x in outputs)
        return outputs, p.mean(-1)


def by_rows(layer, x: Float[Array, "*batch _"]) -> Float[Array, "*batch _"]:
    """layer(x) over ONE axis of rows: with two in front, XLA:CPU transposes the incoming gradient before it forms a kernel's."""
    y = layer(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def dense(x: Float[Array, "*batch _"], features: int, dtype: Any, name: str, **fields) -> Float[Array, "*batch _"]:
    return by_rows(nn.Dense(features, dtype=dtype, name=name, **fields), x)
