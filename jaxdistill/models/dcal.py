"""DCAL (Zhu et al. 2022, "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification").

Three streams through one ViT. SA: the ViT itself. GLCA, global-local: one more block with weights of its own, whose queries are
the tokens that the attention rollout says CLS looks at, and whose keys and values are all tokens. PWCA, pair-wise, in training
only: the same image through the same weights, distracted at every depth by the keys and values of another image.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxdistill import UserError
from jaxdistill.models.layers import LayerNorm
from jaxdistill.models.vit import Block, ViT, ViTConfig, fold, head, roll

SELECT = ("rollout", "last", "random")
READOUT = ("mean", "cls")
PWCA = ("", "shared", "own")


@dataclasses.dataclass(frozen=True)
class Branches:
    """What stands beside SA; without `glca` and `pwca` it is a plain ViT. The paper leaves open cls_query, attach and pwca's head.

    glca: the global-local branch. pwca: "" for none, "shared" for the head of SA, "own" for one of its own.
    queries: the share of patches that are queries of GLCA (the paper: 0.1, for re-identification 0.3), rounded down, at least one.
    cls_query: CLS is one of the queries.
    readout: what GLCA classifies, the "mean" of its queries or the one of "cls". The paper reads CLS; but in one block no query
    sees another, so that which patches were chosen then changes nothing at all, in value or in gradient.
    attach: GLCA stands on the output of this block, counted from 1 (0: the last), and the rollout ends there.
    select: queries by the rollout; by the attention of the `last` block alone; or at `random`, another choice for each image
    where there is a key, one choice for all where there is none.
    """

    glca: bool = True
    pwca: str = "shared"
    queries: float = 0.1
    cls_query: bool = True
    readout: str = "mean"
    attach: int = 0
    select: str = "rollout"

    def __post_init__(self):
        flags = (False, True)
        for key, accepted in (("pwca", PWCA), ("select", SELECT), ("readout", READOUT), ("glca", flags), ("cls_query", flags)):
            if getattr(self, key) not in list(accepted):
                raise UserError(f"{key}: found {getattr(self, key)!r}; accepted: {', '.join(map(repr, accepted))}")
        if self.readout == "cls" and not self.cls_query:
            raise UserError("readout: found 'cls' without cls_query; accepted: 'mean'")
        if not 0 < self.queries <= 1:
            raise UserError(f"queries: found {self.queries!r}; accepted: a share of the patches, above 0 and at most 1")
        if type(self.attach) is not int or self.attach < 0:
            raise UserError(f"attach: found {self.attach!r}; accepted: a block counted from 1, or 0 for the last")

    def count(self, patches: int) -> int:
        """How many patches are queries."""
        return max(1, int(self.queries * patches + 1e-6))  # 0.29 * 100 is 28.999999999999996


PLAIN = Branches(glca=False, pwca="")


class DCAL(nn.Module):
    """SA, GLCA and PWCA. `dtype`, `remat`: as of `ViT`, whose parameters are under "vit"."""

    vit: ViTConfig
    branches: Branches = Branches()
    dtype: Any = jnp.float32
    remat: bool = False

    def __post_init__(self):
        if self.branches.attach > self.vit.depth:
            raise UserError(f"attach: found {self.branches.attach}; accepted: at most the depth ({self.vit.depth})")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "images rows columns channels"],
        *,
        partner: Int[Array, " batch"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[dict[str, Float[Array, "batch classes"]], dict[str, Array]]:
        """Logits of each stream, and features.

        Args:
          images: normalised. Those beyond the length of `partner` are partners only.
          partner: of each example, the index into `images` of the image that distracts it; None: no PWCA, and every image
            is an example.
          key: with one, drop-path is on, and random queries differ between images.

        Returns:
          logits (float32): "sa", "glca" and "pwca", those that there are.
          features: "sa", "glca", "pwca", what each head classifies [batch, width]; "block_i" and "pwca_block_i", the outputs of
          the blocks [batch, 1 + patches, width] (of the last of PWCA only CLS: nothing else of it is used); "rollout", the CLS row
          up to the block that GLCA stands on, without CLS itself [batch, patches], float32. Of GLCA "queries", int32
          [batch, count], the patches that were chosen, best first, and "glca_attention" [batch, patches], float32, where what it
          classifies looks (means over heads, and over the queries that are read).
        """
        c, b = self.vit, self.branches
        if partner is None and self.is_initializing():  # a head of its own must be there whatever it is initialised with
            partner = jnp.arange(len(images))
        batch = len(images) if partner is None else len(partner)
        if not b.pwca:
            images, partner = images[:batch], None
        trunk = ViT(c, self.dtype, self.remat, name="vit")
        x = trunk.embed(images)
        paired, rollout, attach = x[:batch], None, b.attach or c.depth
        features = {}
        for i, block in enumerate(trunk.block):
            x, attention, (k, v) = block(x, None, None, fold(key, i))
            features[f"block_{i}"] = x[:batch]
            if partner is not None:
                rows = jnp.zeros((batch, 1), jnp.int32) if i + 1 == c.depth else None
                paired = features[f"pwca_block_{i}"] = block(paired, rows, (k[partner], v[partner]), fold(key, c.depth + i))[0]
            if i < attach:
                rollout = roll(rollout, attention[:batch])
            if i + 1 == attach:
                tokens, last = x[:batch], attention[:batch]

        def classify(name: str, state: Float[Array, "batch width"], last_layer: nn.Module):
            features[name] = state
            return last_layer(state.astype(jnp.float32))

        features["rollout"] = rollout[:, 0, 1:]
        outputs = {"sa": classify("sa", trunk.ln_f(x[:batch])[:, 0], trunk.head)}
        if b.glca:
            seen = {"rollout": features["rollout"], "last": last[:, 0, 1:], "random": self._random(batch, key)}[b.select]
            features["queries"] = queries = jax.lax.top_k(seen, b.count(c.patches))[1]
            rows = jnp.pad(queries + 1, ((0, 0), (1, 0))) if b.cls_query else queries + 1  # CLS is token 0
            block = nn.remat(Block) if self.remat else Block
            local, attention, _ = block(c, c.drop_path, self.dtype, name="glca_block")(tokens, rows, None, fold(key, 2 * c.depth))
            features["glca_attention"] = (attention[:, 0] if b.readout == "cls" else attention.mean(1))[:, 1:]
            local = LayerNorm(c.eps, self.dtype, name="glca_ln_f")(local)
            state = local[:, 0] if b.readout == "cls" else local.mean(1)
            outputs["glca"] = classify("glca", state, head(c.classes, name="glca_head"))
        if partner is not None:
            own = head(c.classes, name="pwca_head") if b.pwca == "own" else trunk.head
            outputs["pwca"] = classify("pwca", trunk.ln_f(paired)[:, 0], own)
        return outputs, features

    def _random(self, batch: int, key: Key[Array, ""] | None) -> Float[Array, "batch patches"]:
        """Scores that choose patches at random."""
        if key is not None:
            return jax.random.uniform(fold(key, 2 * self.vit.depth + 1), (batch, self.vit.patches))
        return jnp.broadcast_to(jax.random.uniform(jax.random.key(0), (1, self.vit.patches)), (batch, self.vit.patches))
