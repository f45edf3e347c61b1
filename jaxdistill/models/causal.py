"""A causal language model from a config section: a Hugging Face folder, or sizes for a fresh one."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill import UserError, models
from jaxdistill.models import gpt2, hf, llama

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
FAMILIES = {"gpt2": gpt2, "llama": llama}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A section `model`, `student` or `teacher`. path: a local folder of config.json and safetensors, or a model's name
    on the hub, whose family, sizes and weights are taken; "": a fresh model of `family` and of the sizes. kv_heads: of a Llama (0:
    heads). dtype: of the computation; parameters that train stay float32."""

    path: str = ""
    family: str = "gpt2"
    width: int = 128
    depth: int = 2
    heads: int = 4
    kv_heads: int = 0
    dtype: str = "float32"
    remat: bool = False


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """module: apply({"params": params}, tokens, segments=, positions=) -> (logits, features). init: (key) -> params, from the
    folder where there is one. load: (place) -> params of the folder to be frozen, each straight into the sharding place(path), matrices
    in the dtype of the computation. decay: regex of the parameters for weight decay. facts: JSON, with the content hash of a folder."""

    module: Any
    init: Callable
    load: Callable
    save: Callable
    sharding: tuple
    decay: str
    facts: dict
    parameters: int
    vocab: int
    folder: str

    @property
    def width(self) -> int:
        return self.module.config.width

    @property
    def depth(self) -> int:
        return self.module.config.depth

    @property
    def heads(self) -> int:
        return self.module.config.heads

    @property
    def dtype(self) -> Any:
        return self.module.dtype

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the features that hold each expert's own output; () without experts."""
        return tuple(f"experts_{i}" for i in range(self.depth)) if getattr(self.module.config, "experts", 0) else ()

    def head(self, params):
        """The output embedding [vocab, width], tied or not."""
        return params["head" if "head" in params else "wte"]["embedding"]

    def features(self, params, tokens, layout: dict) -> tuple:
        """(the module's features, output embedding [vocab, width])."""
        _, features = self.module.apply({"params": params}, tokens, **layout)
        return features, self.head(params)

    def example(self) -> dict:
        """Zeros in the shapes of the features of one row of 2 tokens, to initialise with."""
        (_, features), _ = jax.eval_shape(self.module.init_with_output, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), features)

    def hidden_and_head(self, params, tokens, layout: dict) -> tuple:
        """(final states [batch, time, width], output embedding [vocab, width]): the logits, before they are multiplied out."""
        features, head = self.features(params, tokens, layout)
        return features["final"], head


def describe(config: ModelConfig, key: str, *, vocab: int, length: int) -> CausalLM:
    """The model of section `key`; weights are read only by `init`. UserError where it cannot hold `vocab` ids or
    rows of `length` tokens."""
    if config.dtype not in DTYPES:
        raise UserError(f"config key {key}.dtype: found {config.dtype!r}; accepted: {', '.join(DTYPES)}")
    if config.family not in FAMILIES:
        raise UserError(f"config key {key}.family: found {config.family!r}; accepted: {', '.join(FAMILIES)}")
    compute = {"dtype": DTYPES[config.dtype], "remat": config.remat}
    if config.path:
        config = dataclasses.replace(config, path=hf.fetched(config.path, f"{key}.path"))
        family = models.family(config.path)
        sizes = family.config_from_hf(config.path)
        if sizes.vocab < vocab:
            raise UserError(f"config key {key}.path: found a model of {sizes.vocab} ids in {config.path}; accepted: one that "
                            f"holds the tokenizer's {vocab} (data.tokenizer must be the model's own)")
        if sizes.length < length:
            raise UserError(f"config key data.length: found {length}; accepted: at most the {sizes.length} positions of {config.path}")
    else:
        family, sizes = FAMILIES[config.family], fresh(config, key, vocab=vocab, length=length)
    module = (gpt2.GPT2 if family is gpt2 else llama.Llama)(sizes, **compute)
    load = lambda place=None: family.from_hf(config.path, place=place, frozen=True, **compute)[1]  # noqa: E731
    if config.path:
        init = lambda key: family.from_hf(config.path, **compute)[1]  # noqa: E731
    else:
        example = jnp.zeros((1, min(2, length)), jnp.int32)
        init = lambda key: jax.jit(module.init)(key, example)["params"]  # noqa: E731
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    facts = {**dataclasses.asdict(sizes), **({"weights": hf.folder_hash(config.path)} if config.path else {})}
    return CausalLM(
        module=module, init=init, load=load, sharding=family.SHARDING, decay=family.decay(sizes), facts=facts, vocab=sizes.vocab,
        folder=config.path, parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        save=lambda params, folder, eos: family.to_hf(module, params, Path(folder), bos_token_id=eos, eos_token_id=eos),
    )


def longest(config: ModelConfig) -> int:
    """The positions that the model in `config.path` has."""
    return models.family(config.path).config_from_hf(config.path).length


def fresh(config: ModelConfig, key: str, *, vocab: int, length: int) -> gpt2.GPT2Config | llama.LlamaConfig:
    """The sizes of a fresh model. A Llama's three MLP matrices have the parameters of GPT-2's two, and its head is tied."""
    for size in ("width", "depth", "heads"):
        if getattr(config, size) < 1:
            raise UserError(f"config key {key}.{size}: found {getattr(config, size)}; accepted: 1 or more")
    if config.width % config.heads:
        raise UserError(f"config key {key}.heads: found {config.heads} with width {config.width}; accepted: a divisor of it")
    sizes = dict(vocab=vocab, length=length, width=config.width, depth=config.depth, heads=config.heads)
    if config.family == "gpt2":
        if config.kv_heads:
            raise UserError(f"config key {key}.kv_heads: found {config.kv_heads} with family gpt2; accepted: 0")
        return gpt2.GPT2Config(**sizes)
    if config.width // config.heads % 2:
        raise UserError(f"config key {key}.heads: found {config.heads} with width {config.width}; accepted: heads of an even width")
    if config.kv_heads < 0 or config.heads % (config.kv_heads or 1):
        raise UserError(f"config key {key}.kv_heads: found {config.kv_heads} with heads {config.heads}; accepted: 0, or a divisor of it")
    return llama.LlamaConfig(**sizes, kv_heads=config.kv_heads, inner=8 * -(-config.width // 3), tied=True)
