"""A mixture of SwiGLU experts, routed as Qwen3-MoE is (Yang et al. 2025, "Qwen3 Technical Report"; no shared expert)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Stack(nn.Module):
    """The kernel of one matrix of every expert: [experts, in, out]."""

    shape: tuple[int, int, int]
    std: float

    @nn.compact
    def __call__(self) -> Float[Array, "experts _ _"]:
        return self.param("kernel", nn.initializers.normal(self.std), self.shape)


class MoE(nn.Module):
    """Softmax over all experts in float32; the `top_k` largest gates weigh their experts' outputs (divided by their sum
    first where `norm_topk`).

    Every expert is run on every token, one expert at a time: any mesh divides the work evenly, memory is one expert's,
    and a scan of experts costs experts / top_k times the arithmetic of sorted tokens. (`jax.lax.ragged_dot` is native
    on TPUs only; elsewhere JAX copies the tokens once an expert.)
    """

    inner: int
    experts: int
    top_k: int
    norm_topk: bool
    down_std: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> tuple[Float[Array, "batch time width"], dict]:
        """The mix, and features "router" (gates of all experts [batch, time, experts], float32) and "experts" (what
        each of them makes of each token [batch, time, experts, width], compiled only where it is used)."""
        width = x.shape[-1]
        up = (self.experts, width, self.inner)
        kernels = Stack(up, 0.02, name="gate")(), Stack(up, 0.02, name="up")()
        kernels += (Stack((self.experts, self.inner, width), self.down_std, name="down")(),)
        rows = x.reshape(-1, width)
        router = nn.Dense(self.experts, use_bias=False, kernel_init=nn.initializers.normal(0.02), name="router")
        gates = jax.nn.softmax(router(rows.astype(jnp.float32)), axis=-1)
        kept, chosen = jax.lax.top_k(gates, self.top_k)
        if self.norm_topk:
            kept = kept / kept.sum(-1, keepdims=True)
        weights = jnp.einsum("nk,nke->en", kept, jax.nn.one_hot(chosen, self.experts, dtype=jnp.float32))

        @jax.checkpoint  # keeps no expert's hidden states for the gradient
        def step(total, expert):
            weight, *kernel = expert
            return total + weight[:, None] * swiglu(rows, *kernel).astype(jnp.float32), None

        total, _ = jax.lax.scan(step, jnp.zeros(rows.shape, jnp.float32), (weights, *kernels))
        features = {"router": gates.reshape(*x.shape[:2], -1), "experts": _each(x, kernels)}
        return total.astype(self.dtype).reshape(x.shape), features


def swiglu(x: Float[Array, "rows width"], gate, up, down) -> Float[Array, "rows width"]:
    """SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer") in the dtype of x."""
    gate, up, down = (kernel.astype(x.dtype) for kernel in (gate, up, down))
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def _each(x, kernels) -> Float[Array, "batch time experts width"]:
    outputs = jax.vmap(swiglu, in_axes=(None, 0, 0, 0))(x.reshape(-1, x.shape[-1]), *kernels)
    return jnp.moveaxis(outputs, 0, 1).reshape(*x.shape[:2], -1, x.shape[-1])
