"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") in Linen.

Numerics follow the released model: pre-LayerNorm, learned positions, tanh-GELU, tied head. There is no dropout: a
student is short of capacity and not of regularisation, and a teacher must give the same targets twice.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int

from jaxdistill import UserError
from jaxdistill.models import hf, kv_cache
from jaxdistill.models.layers import LayerNorm

# First match wins, by re.search: the same rule serves a parameter, its moments and its EMA. Every leaf is cut over
# fsdp x model. Embeddings are cut on the width: vocabularies (50,257) seldom divide.
SHARDING = (
    (r"w[tp]e/embedding", jax.P(None, ("fsdp", "model"))),
    (r"(attention/qkv|mlp/up)/kernel", jax.P("fsdp", "model")),  # column-parallel
    (r"(attention/out|mlp/down)/kernel", jax.P("model", "fsdp")),  # row-parallel
    (r"(ln_[12f]|qkv|out|up|down)/(bias|scale)", jax.P(("fsdp", "model"))),
)
# Weight decay: the matrices that multiply activations, so also wte, which is the tied head and gets a dense gradient
# at every step. Not wpe: rows of positions that the data seldom reach would only shrink.
DECAY = r"(kernel|wte/embedding)$"
# What is cast to the computing dtype before every use. Not the embeddings, which are added up in float32.
CAST = r"kernel$"

ACTIVATIONS = {"gelu_new": nn.gelu, "gelu_pytorch_tanh": nn.gelu, "relu": nn.relu}
ACTIVATIONS["gelu"] = functools.partial(nn.gelu, approximate=False)
# GPT2Config's fields in a config.json (the last three may be absent: the defaults are the same), and entries that
# must have this value where they are present.
_SIZES = {"vocab": "vocab_size", "length": "n_positions", "width": "n_embd", "depth": "n_layer", "heads": "n_head"}
_KEYS = _SIZES | {"inner": "n_inner", "eps": "layer_norm_epsilon", "activation": "activation_function"}
_REQUIRED = {"model_type": "gpt2", "tie_word_embeddings": True, "scale_attn_weights": True}
_REQUIRED |= {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
_NAMES = (  # regexes, parameter path -> tensor name
    (r"block_(\d+)", r"h.\1"), (r"attention/qkv", "attn.c_attn"), (r"attention/out", "attn.c_proj"),
    (r"mlp/up", "mlp.c_fc"), (r"mlp/down", "mlp.c_proj"), (r"(kernel|scale|embedding)$", "weight"), (r"/", "."),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Sizes of a GPT-2: `length` counts positions, `inner` is the MLP's width (None: 4 x width)."""

    vocab: int
    length: int
    width: int
    depth: int
    heads: int
    inner: int | None = None
    eps: float = 1e-5
    activation: str = "gelu_new"

    def __post_init__(self):
        for key in (*_SIZES, "inner"):
            value = getattr(self, key)
            if (type(value) is not int or value < 1) and not (key == "inner" and value is None):
                raise UserError(f"{key}: found {value!r}; accepted: an integer of at least 1")
        if not isinstance(self.eps, float) or not 0 < self.eps < 1:
            raise UserError(f"eps: found {self.eps!r}; accepted: a number between 0 and 1")
        if self.width % self.heads:
            raise UserError(f"heads: found {self.heads}; accepted: a divisor of width ({self.width})")
        if self.activation not in list(ACTIVATIONS):  # a list: what is found may not be hashable
            raise UserError(f"activation: found {self.activation!r}; accepted: {', '.join(ACTIVATIONS)}")

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def _linear(x: Float[Array, "batch time _"], features: int, std: float, dtype: Any, name: str):
    """A Dense over the rows of x as ONE matrix. With [batch, time] in front, XLA:CPU transposes the incoming gradient
    before it forms the kernel's, and a training step takes 1.3 times as long."""
    dense = nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.normal(std), name=name)
    return dense(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)


class Attention(nn.Module):
    """Causal multi-head self-attention; returns the output and, as features, the probabilities [batch, heads, time, time], or
    with a `cache` (kv_cache.KVCache.block) its keys and values, extended."""

    config: GPT2Config
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"], same: Bool[Array, "batch 1 time keys"] | None, cache: tuple | None = None):
        c = self.config
        qkv = _linear(x, 3 * c.width, 0.02, self.dtype, "qkv")
        q, k, v = (a.reshape(*x.shape[:2], c.heads, -1) for a in jnp.split(qkv, 3, axis=-1))
        if cache is not None:
            k, v = kv_cache.append(cache, k, v)
        with jax.numpy_dtype_promotion("standard"):  # its own float32 softmax is an implicit promotion from bfloat16
            out = jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=cache is None)
        out = _linear(out.reshape(x.shape), c.width, 0.02 / (2 * c.depth) ** 0.5, self.dtype, "out")
        return out, {"attention": _probabilities(q, k, same)} if cache is None else {"keys": k, "values": v}


def _probabilities(q, k, same) -> Float[Array, "batch heads time time"]:
    """What `dot_product_attention` keeps to itself, beside the main path: compiled only where it is used."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    mask = jnp.tril(jnp.ones((1, 1, *scores.shape[2:]), bool)) & (True if same is None else same)
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)


class MLP(nn.Module):
    config: GPT2Config
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        c = self.config
        x = ACTIVATIONS[c.activation](_linear(x, c.inner or 4 * c.width, 0.02, self.dtype, "up"))
        return _linear(x, c.width, 0.02 / (2 * c.depth) ** 0.5, self.dtype, "down")


class Block(nn.Module):
    config: GPT2Config
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"], same: Bool[Array, "batch 1 time keys"] | None, cache: tuple | None = None):
        c = self.config
        h = LayerNorm(c.eps, self.dtype, name="ln_1")(x)
        h, inside = Attention(c, self.dtype, name="attention")(h, same, cache)
        x = x + h
        h = LayerNorm(c.eps, self.dtype, name="ln_2")(x)
        return x + MLP(c, self.dtype, name="mlp")(h), inside


class GPT2(nn.Module):
    """GPT-2 language model. `dtype` is that of the computation, parameters stay float32; `remat` recomputes each
    block in the backward pass, which changes memory and time and no result."""

    config: GPT2Config
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        *,
        segments: Int[Array, "batch time"] | None = None,
        positions: Int[Array, "batch time"] | None = None,
        cache: kv_cache.KVCache | None = None,
    ) -> tuple[Float[Array, "batch time vocab"], dict[str, Float[Array, "..."]]]:
        """Next-token logits (float32) and every intermediate.

        Args:
          tokens: ids below `config.vocab`; one above gives NaN, not a wrong row.
          segments: number of the document each token belongs to, 0 for padding. A token sees itself and earlier ones
            of its own segment (padding sees padding: its rows stay finite). None: one document a row.
          positions: position of each token in its document; None: 0, 1, 2...
          cache: what was read before these tokens, whose slots must have room for them; segments and positions are then needed.

        Returns:
          logits, and features: "embed", "block_i" (the block's output), "final" (after the last LayerNorm), all
          [batch, time, width] in `dtype`; "attention_i", softmax probabilities [batch, heads, time, time], float32; with a cache
          in place of these "keys_i" and "values_i" [batch, slots, heads, channels], of which `kv_cache.extended` makes the next.
          `UserError` where a row is longer than `config.length`.
        """
        c = self.config
        if tokens.shape[1] > c.length:
            raise UserError(f"length: found rows of {tokens.shape[1]} tokens; accepted: at most {c.length}")
        wte = nn.Embed(c.vocab, c.width, embedding_init=nn.initializers.normal(0.02), name="wte")
        wpe = nn.Embed(c.length, c.width, embedding_init=nn.initializers.normal(0.01), name="wpe")
        positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        x = (wte(tokens) + wpe(positions)).astype(self.dtype)  # looked up in float32: so the gradient is summed in it
        same = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
        if cache is not None:
            same = kv_cache.visible(cache, segments)
        features = {"embed": x}
        block = nn.remat(Block) if self.remat else Block
        for i in range(c.depth):
            x, inside = block(c, self.dtype, name=f"block_{i}")(x, same, cache and cache.block(i))
            features |= {f"block_{i}": x} | {f"{name}_{i}": value for name, value in inside.items()}
        features["final"] = x = LayerNorm(c.eps, self.dtype, name="ln_f")(x)
        head = wte.embedding.astype(self.dtype)
        logits = jnp.einsum("nd,vd->nv", x.reshape(-1, c.width), head, preferred_element_type=jnp.float32)
        return logits.reshape(*tokens.shape, c.vocab), features


def config_from_hf(folder: str | os.PathLike) -> GPT2Config:
    """The sizes in a folder's `config.json`; `UserError` for a GPT-2 variant that is not supported."""
    raw, file = hf.read_config(folder), f"{folder}/{hf.CONFIG}"
    for key, accepted in _REQUIRED.items():
        if raw.get(key, accepted) != accepted:
            raise UserError(f"{file}: {key}: found {raw[key]!r}; accepted: {accepted!r}")
    for key in _SIZES.values():
        if type(raw.get(key)) is not int:
            raise UserError(f"{file}: {key}: found {raw.get(key, 'nothing')!r}; accepted: an integer")
    try:
        return GPT2Config(**{ours: raw[key] for ours, key in _KEYS.items() if key in raw})
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def from_hf(
    folder: str | os.PathLike,
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
    place: Callable[[str], jax.sharding.Sharding] | None = None,
    frozen: bool = False,
) -> tuple[GPT2, dict]:
    """`(module, params)` of a Hugging Face GPT-2 folder; parameters are float32 whatever the file holds. `place`: path
    of a parameter ("wte/embedding") -> the sharding it is read into. `frozen`: nothing will train them; what `CAST` names
    is then held in `dtype`: the same results in half the memory, where that is bfloat16. `UserError`, one line naming the
    key or file, for a folder, config or tensor that is not as it should be."""
    module = GPT2(config_from_hf(folder), dtype=dtype, remat=remat)
    params = hf.load(  # old files store the tied head twice, and every block's causal mask
        folder, _stored(module), place=place, dtype=hf.held(CAST, dtype if frozen else jnp.float32), prefix="transformer.",
        ignore=r"h\.\d+\.attn\.(masked_)?bias", tied=("lm_head.weight", "wte.weight"),
    )  # fmt: skip
    return module, unflatten_dict(params, sep="/")


def to_hf(module: GPT2, params: dict, folder: str | os.PathLike, **config) -> None:
    """Write a float32 folder that `transformers.GPT2LMHeadModel.from_pretrained` loads.
    `config`: more entries for `config.json`, as `bos_token_id` and `eos_token_id` (null if not given: transformers'
    own default, 50256, is out of a small vocabulary). `UserError` for entries that are the model's own, parameters
    that are not those of `module`, and a folder that cannot be written.
    """
    own = _REQUIRED | {"architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    own |= {key: getattr(module.config, ours) for ours, key in _KEYS.items()}
    for key in config.keys() & own.keys():
        raise UserError(f"{key}: found {config[key]!r}; accepted: only entries that the model does not set itself")
    tensors = hf.dump(_stored(module), flatten_dict(params, sep="/"))
    tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    hf.write_folder(folder, {"bos_token_id": None, "eos_token_id": None} | config | own, tensors)


def decay(config: GPT2Config) -> str:
    """The regex of the parameters that weight decay is for."""
    return DECAY


@functools.cache
def _stored(module: GPT2) -> dict[str, hf.Stored]:
    """Parameter path -> where it lies on disk, without allocating any."""
    tree = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return {path: hf.Stored(x.shape, _hf_name(path)) for path, x in flatten_dict(tree, sep="/").items()}


def _hf_name(path: str) -> str:
    """block_0/attention/qkv/kernel -> h.0.attn.c_attn.weight. Nothing is transposed: Conv1D is (in, out) too."""
    for ours, theirs in _NAMES:
        path = re.sub(ours, theirs, path)
    return path
