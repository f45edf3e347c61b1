"""A causal language model from a config section: a Hugging Face folder, or sizes for a fresh GPT-2."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill import UserError
from jaxdistill.models import gpt2, hf

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A section `model`, `student` or `teacher`. path: a local folder of config.json and safetensors, whose sizes and
    weights are taken; "": a fresh model of the sizes. dtype: of the computation; parameters stay float32."""

    path: str = ""
    width: int = 128
    depth: int = 2
    heads: int = 4
    dtype: str = "float32"
    remat: bool = False


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """module: apply({"params": params}, tokens, segments=, positions=) -> (logits, features). init: (key) -> params,
    from the folder where there is one. facts: JSON, with the content hash of a folder."""

    module: Any
    init: Callable
    save: Callable
    sharding: tuple
    facts: dict
    parameters: int
    vocab: int
    folder: str

    def hidden_and_head(self, params, tokens, layout: dict) -> tuple:
        """(final states [batch, time, width], output embedding [vocab, width]): the logits, before they are multiplied out."""
        _, features = self.module.apply({"params": params}, tokens, **layout)
        return features["final"], params["wte"]["embedding"]


def describe(config: ModelConfig, key: str, *, vocab: int, length: int) -> CausalLM:
    """The model of section `key`; weights are read only by `init`. UserError where it cannot hold `vocab` ids or
    rows of `length` tokens."""
    if config.dtype not in DTYPES:
        raise UserError(f"config key {key}.dtype: found {config.dtype!r}; accepted: {', '.join(DTYPES)}")
    compute = {"dtype": DTYPES[config.dtype], "remat": config.remat}
    if config.path:
        sizes = gpt2.config_from_hf(config.path)
        if sizes.vocab < vocab:
            raise UserError(f"config key {key}.path: found a model of {sizes.vocab} ids in {config.path}; accepted: one that "
                            f"holds the tokenizer's {vocab} (data.tokenizer must be the model's own)")
        if sizes.length < length:
            raise UserError(f"config key data.length: found {length}; accepted: at most the {sizes.length} positions of {config.path}")
        init = lambda key: gpt2.from_hf(config.path, **compute)[1]  # noqa: E731
    else:
        for size in ("width", "depth", "heads"):
            if getattr(config, size) < 1:
                raise UserError(f"config key {key}.{size}: found {getattr(config, size)}; accepted: 1 or more")
        if config.width % config.heads:
            raise UserError(f"config key {key}.heads: found {config.heads} with width {config.width}; accepted: a divisor of it")
        sizes = gpt2.GPT2Config(vocab=vocab, length=length, width=config.width, depth=config.depth, heads=config.heads)
        example = jnp.zeros((1, min(2, length)), jnp.int32)
        init = lambda key: jax.jit(gpt2.GPT2(sizes, **compute).init)(key, example)["params"]  # noqa: E731
    module = gpt2.GPT2(sizes, **compute)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    facts = {**dataclasses.asdict(sizes), **({"weights": hf.folder_hash(config.path)} if config.path else {})}
    return CausalLM(
        module=module, init=init, sharding=gpt2.SHARDING, facts=facts, vocab=sizes.vocab, folder=config.path,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        save=lambda params, folder, eos: gpt2.to_hf(module, params, Path(folder), bos_token_id=eos, eos_token_id=eos),
    )
