"""The Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words") in Linen: ViT and DeiT without distillation token.

Numerics follow the released models: pre-LayerNorm, a CLS token, learned positions, exact GELU. LayerNorm's epsilon and the
activation are the file's. Of attention only the head mean leaves a block, and of all blocks together one matrix, the rollout:
the maps of every layer and head of one picture of 448 pixels would be 355 MB.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, Key

from jaxdistill import UserError
from jaxdistill.models import vit_files
from jaxdistill.models.gpt2 import ACTIVATIONS
from jaxdistill.models.layers import LayerNorm

# As in gpt2.py: first match wins, and every leaf is cut over fsdp x model; but the bias of a head, of as many entries as
# there are classes, is whole everywhere. Embeddings and heads are cut on the width.
SHARDING = (
    (r"(attention/[qkv]|mlp/up)/kernel", jax.P("fsdp", "model")),  # column-parallel
    (r"(attention/out|mlp/down)/kernel", jax.P("model", "fsdp")),  # row-parallel
    (r"head/kernel", jax.P(("fsdp", "model"), None)),
    (r"head/bias", jax.P()),
    (r"embed/(cls|position)", jax.P(None, None, ("fsdp", "model"))),
    (r"patch/kernel", jax.P(None, None, None, ("fsdp", "model"))),
    (r"(ln_[12f]|attention/[qkv]|out|up|down|patch)/(bias|scale)", jax.P(("fsdp", "model"))),
)
# Weight decay: the matrices that multiply activations. Not LayerNorm, biases, positions and CLS.
DECAY = r"kernel$"

_DEIT = {"width": 192, "depth": 12, "heads": 3, "patch": 16}
PRESETS = {
    "tiny": {"width": 96, "depth": 6, "heads": 3, "patch": 8},
    "deit_tiny": _DEIT,
    "deit_small": _DEIT | {"width": 384, "heads": 6},
    "deit_base": _DEIT | {"width": 768, "heads": 12},
    "vit_small": _DEIT | {"width": 384, "heads": 6},
    "vit_base": _DEIT | {"width": 768, "heads": 12},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of a ViT. image: (rows, columns) in pixels, multiples of `patch`. inner: the MLP's width (None: 4 x width).
    drop_path: how often a residual branch of the last block is left out in training; it rises linearly from 0 in the first."""

    image: tuple[int, int]
    patch: int
    width: int
    depth: int
    heads: int
    classes: int
    channels: int = 3
    inner: int | None = None
    eps: float = 1e-6
    activation: str = "gelu"
    drop_path: float = 0.0

    def __post_init__(self):
        for key in ("patch", "width", "depth", "heads", "classes", "channels", "inner"):
            value = getattr(self, key)
            if (type(value) is not int or value < 1) and not (key == "inner" and value is None):
                raise UserError(f"{key}: found {value!r}; accepted: an integer of at least 1")
        sides = self.image if isinstance(self.image, tuple) and len(self.image) == 2 else (None,)
        if not all(type(side) is int and side > 0 and side % self.patch == 0 for side in sides):
            raise UserError(f"image: found {self.image!r}; accepted: (rows, columns), multiples of the patch of {self.patch} pixels")
        if self.width % self.heads:
            raise UserError(f"heads: found {self.heads}; accepted: a divisor of width ({self.width})")
        if not isinstance(self.eps, float) or not 0 < self.eps < 1:
            raise UserError(f"eps: found {self.eps!r}; accepted: a number between 0 and 1")
        if not isinstance(self.drop_path, int | float) or not 0 <= self.drop_path < 1:
            raise UserError(f"drop_path: found {self.drop_path!r}; accepted: a number from 0 to below 1")
        if self.activation not in list(ACTIVATIONS):  # a list: what is found may not be hashable
            raise UserError(f"activation: found {self.activation!r}; accepted: {', '.join(ACTIVATIONS)}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches: (rows, columns)."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


def _linear(x: Float[Array, "batch tokens _"], features: int, dtype: Any, name: str):
    """A Dense over the rows of x as one matrix (for the reason in gpt2.py)."""
    dense = nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)
    return dense(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)


class Embed(nn.Module):
    """Images -> CLS and one token a patch, row by row, with their positions."""

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: Float[Array, "batch rows columns channels"]) -> Float[Array, "batch tokens width"]:
        c = self.config
        if images.shape[1:] != (*c.image, c.channels):
            raise UserError(f"image: found images of {images.shape[1:]}; accepted: {(*c.image, c.channels)}")
        cls = self.param("cls", nn.initializers.zeros, (1, 1, c.width))
        # As large as what a patch is embedded as. With the usual 0.02 a small ViT cannot tell places apart for hundreds of updates: on
        # the letters of configs/dcal.py it then knows 64 % after 3,900 of them, instead of 71 %, of Omniglot's 68 % instead of 77 %.
        position = self.param("position", nn.initializers.normal(1.0), (1, 1 + c.patches, c.width))
        rows, columns = c.grid
        pixels = images.reshape(-1, rows, c.patch, columns, c.patch, c.channels).transpose(0, 1, 3, 4, 2, 5)
        x = Patch(c.width, self.dtype, name="patch")(pixels.reshape(-1, c.patch, c.patch, c.channels))
        x = x.reshape(-1, c.patches, c.width)
        x = jnp.concatenate([jnp.broadcast_to(cls.astype(self.dtype), (len(x), 1, c.width)), x], axis=1)
        return x + position.astype(self.dtype)


class Patch(nn.Module):
    """One Dense over a patch's pixels. Its kernel is [columns, rows, channels, width]: torch's convolution in reverse order."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, pixels: Float[Array, "patches columns rows channels"]) -> Float[Array, "patches width"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*pixels.shape[1:], self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        return pixels.reshape(len(pixels), -1).astype(self.dtype) @ kernel.reshape(-1, self.width) + bias[None]


def attend(
    q: Float[Array, "batch queries heads d"], k: Float[Array, "batch tokens heads d"], v: Float[Array, "batch tokens heads d"]
) -> tuple[Float[Array, "batch queries heads d"], Float[Array, "batch queries tokens"]]:
    """softmax(q k^T / sqrt(d)) v, and the head mean of the softmax in float32. Both come of the same probabilities."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    probabilities = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", probabilities.astype(v.dtype), v), probabilities.mean(1)


def rows_of(x: Float[Array, "batch tokens width"], rows: Int[Array, "batch queries"] | None) -> Float[Array, "batch queries width"]:
    """x[b, rows[b]]; all of x without rows."""
    return x if rows is None else jnp.take_along_axis(x, rows[:, :, None], axis=1)


def drop_path(x: Float[Array, "batch tokens width"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "batch tokens width"]:
    """Stochastic depth (Huang et al. 2016): 0 for an example with probability `rate`, else x / (1 - rate)."""
    if key is None or not rate:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (len(x), 1, 1))
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


class Block(nn.Module):
    """A pre-LayerNorm transformer block, of self-attention or of either cross-attention. rate: of drop-path."""

    config: ViTConfig
    rate: float
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        rows: Int[Array, "batch queries"] | None = None,
        pair: tuple[Float[Array, "batch others heads d"], Float[Array, "batch others heads d"]] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple:
        """
        Args:
          rows: the tokens that are queries, which alone go on; None: all. Keys and values are of every token.
          pair: keys and values of other tokens, under one softmax with the own.
          key: with one, drop-path is on.

        Returns:
          the queries' tokens [batch, queries, width]; the head mean of the attention [batch, queries, tokens + others],
          float32; the own keys and values, each [batch, tokens, heads, d].
        """
        c = self.config
        first, second = (None, None) if key is None else jax.random.split(key)
        h = LayerNorm(c.eps, self.dtype, name="ln_1")(x)
        h, attention, own = Attention(c, self.dtype, name="attention")(h, rows, pair)
        x = rows_of(x, rows) + drop_path(h, self.rate, first)
        h = LayerNorm(c.eps, self.dtype, name="ln_2")(x)
        return x + drop_path(MLP(c, self.dtype, name="mlp")(h), self.rate, second), attention, own


class Attention(nn.Module):
    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"], rows: Int[Array, "batch queries"] | None, pair: tuple | None) -> tuple:
        c = self.config
        inputs = {"q": rows_of(x, rows), "k": x, "v": x}
        q, k, v = (_linear(y, c.width, self.dtype, name).reshape(*y.shape[:2], c.heads, -1) for name, y in inputs.items())
        both = (k, v) if pair is None else tuple(jnp.concatenate(two, axis=1) for two in zip((k, v), pair, strict=True))
        out, attention = attend(q, *both)
        return _linear(out.reshape(*q.shape[:2], c.width), c.width, self.dtype, "out"), attention, (k, v)


class MLP(nn.Module):
    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        c = self.config
        x = ACTIVATIONS[c.activation](_linear(x, c.inner or 4 * c.width, self.dtype, "up"))
        return _linear(x, c.width, self.dtype, "down")


def roll(rollout: Float[Array, "batch tokens tokens"] | None, attention: Float[Array, "batch tokens tokens"]):
    """Attention rollout (Abnar and Zuidema 2020) one block further: (S + I) / 2 times the product so far, float32. Rows sum
    to 1; no gradient passes."""
    attention = jax.lax.stop_gradient(attention)
    if rollout is None:
        return 0.5 * (attention + jnp.eye(attention.shape[-1])[None])
    return 0.5 * (jnp.matmul(attention, rollout, precision="highest") + rollout)


class ViT(nn.Module):
    """ViT classifier. `dtype` is that of the computation, parameters stay float32; `remat` recomputes each block in the
    backward pass, which changes memory and time and no result."""

    config: ViTConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self):
        c = self.config
        block = nn.remat(Block) if self.remat else Block
        self.embed = Embed(c, self.dtype)
        self.block = [block(c, c.drop_path * i / max(c.depth - 1, 1), self.dtype) for i in range(c.depth)]
        self.ln_f = LayerNorm(c.eps, self.dtype)
        self.head = head(c.classes)

    def __call__(
        self, images: Float[Array, "batch rows columns channels"], *, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "batch classes"], dict[str, Float[Array, "..."]]]:
        """Class logits (float32) and every intermediate; what is not used is not computed under jit.

        Args:
          images: normalised, of `config.image` and `config.channels`.
          key: with one, drop-path is on.

        Returns:
          logits, and features: "embed", "block_i" (the block's output), "final" (after the last LayerNorm), each
          [batch, 1 + patches, width] in `dtype`, CLS first; "attention_i", the head mean, and "rollout", the product over all
          blocks without gradient, each [batch, 1 + patches, 1 + patches], float32, rows summing to 1.
        """
        x, rollout = self.embed(images), None
        features = {"embed": x}
        for i, block in enumerate(self.block):
            x, attention, _ = block(x, None, None, fold(key, i))
            rollout = roll(rollout, attention)
            features |= {f"block_{i}": x, f"attention_{i}": attention}
        final = self.ln_f(x)
        return self.head(final[:, 0].astype(jnp.float32)), features | {"final": final, "rollout": rollout}


def head(classes: int, **fields) -> nn.Dense:
    """A classifier's last layer, in float32 whatever the model's dtype."""
    return nn.Dense(classes, kernel_init=nn.initializers.normal(0.02), **fields)


def fold(key: Key[Array, ""] | None, i: int) -> Key[Array, ""] | None:
    return None if key is None else jax.random.fold_in(key, i)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters of a ViT, or of a module around one, without allocating any."""
    return {path: leaf.shape for path, leaf in flatten_dict(_abstract(module), sep="/").items()}


@functools.cache
def _abstract(module: nn.Module) -> dict:
    return jax.eval_shape(functools.partial(initialise, module), jax.random.key(0))


def initialise(module: nn.Module, key: Key[Array, ""]) -> dict:
    """Fresh parameters of a ViT, or of a module around one. Those of a part do not depend on which other parts there are."""
    c = getattr(module, "vit", None) or module.config
    return jax.jit(module.init)(key, jnp.zeros((1, *c.image, c.channels)))["params"]


def config_of(source: vit_files.Source, *, image=None, classes: int | None = None, drop_path: float = 0.0) -> ViTConfig:
    """The sizes on disk, for images of another size or another number of classes where given."""
    found = dict(source.sizes) | {"drop_path": drop_path}
    if classes is None and not found["classes"]:
        raise UserError(f"{source.path}: classifier: found none; accepted: a model with one, or a new head (classes=)")
    found |= {"classes": classes or found["classes"]}
    try:
        config = ViTConfig(**found)
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None
    return config if image is None else dataclasses.replace(config, image=tuple(image))


def load(
    source: vit_files.Source,
    module: nn.Module,
    *,
    fresh: Callable[[str], bool],
    key: Key[Array, ""] | None = None,
    place: Callable[[str], jax.sharding.Sharding] | None = None,
) -> dict:
    """Parameters of `module`, a ViT or a module around one, from disk; those whose path is `fresh` are initialised with `key`.
    Positions of another grid are resized. UserError for anything missing, unexpected or of another shape."""
    c = getattr(module, "vit", None) or module.config
    wanted = shapes(module)
    new = {path for path in wanted if fresh(path)}
    if new and key is None:
        raise UserError(f"key: found none for the new {min(new)}; accepted: a PRNG key, or the stored head (classes=None)")
    params = vit_files.read(source, {path: shape for path, shape in wanted.items() if path not in new}, c.grid, place)
    if new:
        made = flatten_dict(initialise(module, key), sep="/")
        # (numpy: training.sharding.place says why)
        params |= {path: jax.device_put(np.asarray(made[path]), place(path)) if place else made[path] for path in new}
    return unflatten_dict({path: params[path] for path in wanted}, sep="/")


def from_hf(
    folder: str | os.PathLike,
    *,
    image: tuple[int, int] | None = None,
    classes: int | None = None,
    key: Key[Array, ""] | None = None,
    drop_path: float = 0.0,
    dtype: Any = jnp.float32,
    remat: bool = False,
    place: Callable[[str], jax.sharding.Sharding] | None = None,
) -> tuple[ViT, dict]:
    """`(module, params)` of a Hugging Face `ViTForImageClassification` folder, or of one of Google's `.npz` files; parameters
    are float32 whatever the file holds.

    Args:
      image: (rows, columns) of the images; None: as stored. For others the position embeddings are resized, as transformers'
        `interpolate_pos_encoding` does.
      classes: None: the stored head. A number: a new head of as many, which needs `key`; the stored one is left out.
      place: path of a parameter ("head/kernel") -> the sharding it is read into.
    `UserError`, one line naming the key or file, for a folder, config or tensor that is not as it should be."""
    source = vit_files.open_source(folder)
    module = ViT(config_of(source, image=image, classes=classes, drop_path=drop_path), dtype=dtype, remat=remat)
    fresh = lambda path: classes is not None and path.startswith("head/")  # noqa: E731
    return module, load(source, module, fresh=fresh, key=key, place=place)


def to_hf(module: ViT, params: dict, folder: str | os.PathLike, *, names: tuple[str, ...] | None = None, **config) -> None:
    """Write a float32 folder that `transformers.ViTForImageClassification.from_pretrained` loads. names: of the classes
    (`id2label`). `config`: more entries for `config.json`. `UserError` for entries that are the model's own, parameters that
    are not those of `module`, and a folder that cannot be written."""
    vit_files.write(folder, dataclasses.asdict(module.config), shapes(module), params, names, config)
