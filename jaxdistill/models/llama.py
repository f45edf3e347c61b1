"""The Llama family in Linen: Llama 2 and 3 and SmolLM2 (Touvron et al. 2023, "Llama 2"), Qwen2, Qwen3 and Qwen3-MoE.

Numerics follow the released models: RMSNorm before each part, rotary positions, grouped queries, SwiGLU. What tells the
members apart is in `LlamaConfig`. There is no dropout (see gpt2.py).
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
from jaxdistill.models import hf, kv_cache, rope
from jaxdistill.models.moe import MoE
from jaxdistill.models.rope import Rope

# As in gpt2.py: first match wins, and every leaf is cut over fsdp x model; but the norms of Qwen3's queries and keys,
# of one head's width, are whole everywhere.
SHARDING = (
    (r"(wte|head)/embedding", jax.P(None, ("fsdp", "model"))),
    (r"(attention/[qkv]|mlp/(gate|up))/kernel", jax.P("fsdp", "model")),  # column-parallel
    (r"(attention/out|mlp/down)/kernel", jax.P("model", "fsdp")),  # row-parallel
    (r"moe/(gate|up)/kernel", jax.P(None, "fsdp", "model")),  # not over experts: each is run on every token
    (r"moe/down/kernel", jax.P(None, "model", "fsdp")),
    (r"moe/router/kernel", jax.P(("fsdp", "model"))),
    (r"(ln_[12f]|attention/([qkv]|out)|mlp/(gate|up|down))/(bias|scale)", jax.P(("fsdp", "model"))),
)
# Weight decay: the matrices that multiply activations. A tied wte is the head too (`decay`); one that is only looked up
# is not decayed: rows of tokens that the data seldom reach would only shrink.
DECAY = r"(kernel|head/embedding)$"
TIED_DECAY = r"(kernel|wte/embedding)$"
# What is cast to the computing dtype before every use: the matrices, but for the router's, which stays in float32.
CAST = r"((attention|mlp)/\w+|moe/(gate|up|down))/kernel$|embedding$"

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
KINDS = tuple(_CLASSES)  # config.json's model_type
# LlamaConfig's fields in a config.json: integers that must be there, and entries with transformers' own defaults.
_SIZES = {
    "vocab": "vocab_size", "length": "max_position_embeddings", "width": "hidden_size", "depth": "num_hidden_layers",
    "heads": "num_attention_heads", "inner": "intermediate_size",
}  # fmt: skip
_MOE_SIZES = _SIZES | {"inner": "moe_intermediate_size", "experts": "num_experts", "top_k": "num_experts_per_tok"}
_OPTIONS = {"eps": "rms_norm_eps", "tied": "tie_word_embeddings"}
_BIAS, _MLP_BIAS, _NORM_TOPK = {"attention_bias": "attention_bias"}, {"mlp_bias": "mlp_bias"}, {"norm_topk": "norm_topk_prob"}
_KIND_OPTIONS = {"llama": _BIAS | _MLP_BIAS, "qwen2": {}, "qwen3": _BIAS, "qwen3_moe": _BIAS | _NORM_TOPK}
_REQUIRED = {"hidden_act": "silu"}  # entries that must have this value, or null, where they are present
_QWEN_REQUIRED = _REQUIRED | {"use_sliding_window": False}
_MOE_REQUIRED = _QWEN_REQUIRED | {"decoder_sparse_step": 1, "mlp_only_layers": []}
_TYPES = {int: "an integer", float: "a number between 0 and 1", bool: "true or false"}
_NAMES = (  # regexes, parameter path -> tensor name
    (r"block_(\d+)", r"layers.\1"), (r"attention/([qkv])/", r"self_attn/\1_proj/"), (r"attention/out", "self_attn/o_proj"),
    (r"attention", "self_attn"), (r"ln_1", "input_layernorm"), (r"ln_2", "post_attention_layernorm"), (r"ln_f", "norm"),
    (r"mlp/(\w+)", r"mlp/\1_proj"), (r"moe/router", "mlp/gate"), (r"moe/(\w+)", r"mlp/experts/{}/\1_proj"),
    (r"wte", "embed_tokens"), (r"head", "lm_head"), (r"(kernel|scale|embedding)$", "weight"), (r"/", "."),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A member of the family.

    kind: config.json's model_type. qwen2 has biases on queries, keys and values; qwen3 and qwen3_moe a norm on each
    head's queries and keys; qwen3_moe `experts` in every block, of which a token takes `top_k`.
    length: positions. inner: width of the MLP, or of one expert. kv_heads: groups of query heads (0 becomes heads).
    head_dim: width of one head (0 becomes width / heads). tied: the head is the embedding.
    norm_topk: the gates that are kept are divided by their sum.
    """

    vocab: int
    length: int
    width: int
    depth: int
    heads: int
    inner: int
    kind: str = "llama"
    kv_heads: int = 0
    head_dim: int = 0
    eps: float = 1e-6
    rope: Rope = Rope()
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    experts: int = 0
    top_k: int = 0
    norm_topk: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"kind: found {self.kind!r}; accepted: {', '.join(KINDS)}")
        for key in _sizes(self.kind):
            if getattr(self, key) < 1:
                raise UserError(f"{key}: found {getattr(self, key)}; accepted: an integer of at least 1")
        for key in ("kv_heads", "head_dim"):
            if getattr(self, key) < 0:
                raise UserError(f"{key}: found {getattr(self, key)}; accepted: an integer of at least 1, or none")
        if not 0 < self.eps < 1:
            raise UserError(f"eps: found {self.eps!r}; accepted: a number between 0 and 1")
        if not self.head_dim and self.width % self.heads:
            raise UserError(f"heads: found {self.heads}; accepted: a divisor of width ({self.width})")
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.width // self.heads)
        if self.heads % self.kv_heads:
            raise UserError(f"kv_heads: found {self.kv_heads}; accepted: a divisor of heads ({self.heads})")
        if self.head_dim % 2:
            raise UserError(f"head_dim: found {self.head_dim}; accepted: an even number, whose halves are rotated")
        if self.moe and self.top_k > self.experts:
            raise UserError(f"top_k: found {self.top_k}; accepted: at most the {self.experts} experts")

    @property
    def moe(self) -> bool:
        return self.kind == "qwen3_moe"

    @property
    def down_std(self) -> float:
        """Initial spread of what is added to the residual stream, as GPT-2's."""
        return 0.02 / (2 * self.depth) ** 0.5


class RMSNorm(nn.Module):
    """RMSNorm over the last axis (Zhang and Sennrich 2019), in float32; returns `dtype`."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (x * jnp.expand_dims(scale, range(x.ndim - 1))).astype(self.dtype)


def _linear(x: Float[Array, "batch time _"], features: int, std: float, dtype: Any, name: str, bias: bool):
    """A Dense over the rows of x as one matrix (for the reason in gpt2.py)."""
    dense = nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=nn.initializers.normal(std), name=name)
    return dense(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)


class Attention(nn.Module):
    """Causal self-attention of grouped queries; returns what GPT-2's does."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time width"], same: Bool[Array, "batch 1 time keys"] | None, cos, sin, cache: tuple | None = None
    ):
        c = self.config

        def heads(name: str, count: int):
            y = _linear(x, count * c.head_dim, 0.02, self.dtype, name, c.attention_bias or c.kind == "qwen2")
            return y.reshape(*x.shape[:2], count, c.head_dim)

        q, k, v = heads("q", c.heads), heads("k", c.kv_heads), heads("v", c.kv_heads)
        if c.kind.startswith("qwen3"):
            q, k = RMSNorm(c.eps, self.dtype, name="q_norm")(q), RMSNorm(c.eps, self.dtype, name="k_norm")(k)
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        if cache is not None:
            k, v = kv_cache.append(cache, k, v)
        with jax.numpy_dtype_promotion("standard"):  # its own float32 softmax is an implicit promotion from bfloat16
            out = jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=cache is None)
        out = _linear(out.reshape(*x.shape[:2], -1), c.width, c.down_std, self.dtype, "out", c.attention_bias)
        return out, {"attention": _probabilities(q, k, same)} if cache is None else {"keys": k, "values": v}


def _probabilities(q, k, same) -> Float[Array, "batch heads time time"]:
    """As in gpt2.py: compiled only where it is used. Query head i reads key head i * groups // heads."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    mask = jnp.tril(jnp.ones((1, 1, *scores.shape[2:]), bool)) & (True if same is None else same)
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        c = self.config
        gate, up = (_linear(x, c.inner, 0.02, self.dtype, name, c.mlp_bias) for name in ("gate", "up"))
        return _linear(jax.nn.silu(gate) * up, c.width, c.down_std, self.dtype, "down", c.mlp_bias)


class Block(nn.Module):
    """Returns the block's output and its own features by name: those of attention, and of experts "router" and "experts"."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time width"], same: Bool[Array, "batch 1 time keys"] | None, cos, sin, cache: tuple | None = None
    ):
        c = self.config
        h = RMSNorm(c.eps, self.dtype, name="ln_1")(x)
        h, features = Attention(c, self.dtype, name="attention")(h, same, cos, sin, cache)
        x = x + h
        h = RMSNorm(c.eps, self.dtype, name="ln_2")(x)
        if c.moe:
            h, routed = MoE(c.inner, c.experts, c.top_k, c.norm_topk, c.down_std, self.dtype, name="moe")(h)
            features |= routed
        else:
            h = MLP(c, self.dtype, name="mlp")(h)
        return x + h, features


class Llama(nn.Module):
    """A language model of the Llama family. `dtype`, `remat`: as in `gpt2.GPT2`."""

    config: LlamaConfig
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
        """Next-token logits (float32) and every intermediate: the contract of `gpt2.GPT2`.

        Of a mixture of experts also "router_i", the gates of all experts before any is dropped [batch, time, experts],
        float32, and "experts_i", each expert's own output for each token [batch, time, experts, width].
        """
        c = self.config
        if tokens.shape[1] > c.length:
            raise UserError(f"length: found rows of {tokens.shape[1]} tokens; accepted: at most {c.length}")
        wte = nn.Embed(c.vocab, c.width, embedding_init=nn.initializers.normal(0.02), name="wte")
        positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        cos, sin = rope.angles(c.rope, c.head_dim, positions)
        x = wte(tokens).astype(self.dtype)  # looked up in float32: so the gradient is summed in it
        same = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
        if cache is not None:
            same = kv_cache.visible(cache, segments)
        features = {"embed": x}
        block = nn.remat(Block) if self.remat else Block
        for i in range(c.depth):
            x, inside = block(c, self.dtype, name=f"block_{i}")(x, same, cos, sin, cache and cache.block(i))
            features |= {f"block_{i}": x} | {f"{name}_{i}": value for name, value in inside.items()}
        features["final"] = x = RMSNorm(c.eps, self.dtype, name="ln_f")(x)
        head = wte if c.tied else nn.Embed(c.vocab, c.width, embedding_init=nn.initializers.normal(0.02), name="head")
        head = head.embedding.astype(self.dtype)
        logits = jnp.einsum("nd,vd->nv", x.reshape(-1, c.width), head, preferred_element_type=jnp.float32)
        return logits.reshape(*tokens.shape, c.vocab), features


def config_from_hf(folder: str | os.PathLike) -> LlamaConfig:
    """The sizes in a folder's `config.json`; `UserError` for an entry that is not supported."""
    raw, file = hf.read_config(folder), f"{folder}/{hf.CONFIG}"
    kind = raw.get("model_type")
    if kind not in list(KINDS):
        raise UserError(f"{file}: model_type: found {kind!r}; accepted: {', '.join(KINDS)}")
    raw = {key: value for key, value in raw.items() if value is not None}
    if "num_local_experts" in raw:  # as transformers 5 writes it
        raw.setdefault("num_experts", raw["num_local_experts"])
    for key, accepted in _required(kind).items():
        if raw.get(key, accepted) != accepted:
            raise UserError(f"{file}: {key}: found {raw[key]!r}; accepted: {accepted!r}")
    if "quantization_config" in raw:
        raise UserError(f"{file}: quantization_config: found {raw['quantization_config']!r}; accepted: none, as nothing is dequantised")
    layers = raw.get("layer_types", [])
    for layer in layers if isinstance(layers, list) else [layers]:
        if layer != "full_attention":
            raise UserError(f"{file}: layer_types: found {layer!r}; accepted: 'full_attention' throughout")
    keys, types = _keys(kind), {field.name: field.type for field in dataclasses.fields(LlamaConfig)}
    fields = {ours: raw[key] for ours, key in keys.items() if key in raw}
    for key in sorted(_sizes(kind).values() - raw.keys()):
        raise UserError(f"{file}: {key}: found nothing; accepted: an integer")
    for ours, value in fields.items():
        if type(value) is not types[ours]:
            raise UserError(f"{file}: {keys[ours]}: found {value!r}; accepted: {_TYPES[types[ours]]}")
    try:
        if kind == "qwen3":
            fields = {"head_dim": 128} | fields  # transformers' default
        return LlamaConfig(kind=kind, rope=rope.from_hf(raw, fields["length"]), **fields)
    except UserError as error:
        name, rest = str(error).split(":", 1)  # our name of the field -> the file's
        raise UserError(f"{file}: {keys.get(name, name)}:{rest}") from None


def from_hf(
    folder: str | os.PathLike,
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
    place: Callable[[str], jax.sharding.Sharding] | None = None,
    frozen: bool = False,
) -> tuple[Llama, dict]:
    """`(module, params)` of a Hugging Face folder of model_type llama, qwen2, qwen3 or qwen3_moe, as `gpt2.from_hf`."""
    module = Llama(config_from_hf(folder), dtype=dtype, remat=remat)
    params = hf.load(  # Llama 2's first files hold the rope's frequencies too, some tied ones the head
        folder, _stored(module), place=place, dtype=hf.held(CAST, dtype if frozen else jnp.float32), prefix="model.",
        ignore=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        tied=("lm_head.weight", "embed_tokens.weight") if module.config.tied else None,
    )  # fmt: skip
    return module, unflatten_dict(params, sep="/")


def to_hf(module: Llama, params: dict, folder: str | os.PathLike, **config) -> None:
    """Write a float32 folder that transformers 4 and 5 load as the class of `module.config.kind`. `config` and errors:
    as `gpt2.to_hf`."""
    c = module.config
    own = {"architectures": [_CLASSES[c.kind]], "model_type": c.kind, "dtype": "float32"} | _required(c.kind)
    own |= {key: getattr(c, ours) for ours, key in _keys(c.kind).items()} | c.rope.to_hf()
    own |= {"intermediate_size": c.inner} if c.moe else {}  # of blocks without experts, of which there are none
    for key in config.keys() & own.keys():
        raise UserError(f"{key}: found {config[key]!r}; accepted: only entries that the model does not set itself")
    tensors = hf.dump(_stored(module), flatten_dict(params, sep="/"))
    tensors = {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in tensors.items()}
    hf.write_folder(folder, {"bos_token_id": None, "eos_token_id": None} | config | own, tensors)


def decay(config: LlamaConfig) -> str:
    """The regex of the parameters that weight decay is for."""
    return TIED_DECAY if config.tied else DECAY


def _sizes(kind: str) -> dict[str, str]:
    return _MOE_SIZES if kind == "qwen3_moe" else _SIZES


def _keys(kind: str) -> dict[str, str]:
    return _sizes(kind) | {"kv_heads": "num_key_value_heads", "head_dim": "head_dim"} | _OPTIONS | _KIND_OPTIONS[kind]


def _required(kind: str) -> dict[str, Any]:
    return {"llama": _REQUIRED, "qwen3_moe": _MOE_REQUIRED}.get(kind, _QWEN_REQUIRED)


@functools.cache
def _stored(module: Llama) -> dict[str, hf.Stored]:
    """Parameter path -> where it lies on disk, without allocating any. torch's Linear is (out, in)."""
    tree = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return {path: _where(path, x.shape) for path, x in flatten_dict(tree, sep="/").items()}


def _where(path: str, shape: tuple[int, ...]) -> hf.Stored:
    """block_0/attention/q/kernel -> layers.0.self_attn.q_proj.weight, transposed."""
    name = path
    for ours, theirs in _NAMES:
        name = re.sub(ours, theirs, name)
    names = tuple(name.format(i) for i in range(shape[0])) if "{}" in name else name
    return hf.Stored(shape, names, transposed=path.endswith("kernel"))
