"""A published Llama, read from its author's own file, writes the text that its author documents."""

import os
import re
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from jaxdistill.models import from_hf, llama


def read_llama2c(path: Path) -> tuple[llama.Llama, dict]:
    """A checkpoint of llama2.c (its first format): seven integers, then every matrix as (layers, out, in), in float32."""
    content = path.read_bytes()
    width, inner, depth, heads, kv_heads, vocab, length = struct.unpack("7i", content[:28])
    rest = np.frombuffer(content, np.float32, offset=28)

    def take(*shape):
        nonlocal rest
        taken, rest = np.split(rest, [int(np.prod(shape))])
        return taken.reshape(shape)

    def halves(matrices, count):  # a head's channels are rotated in neighbouring pairs there, first with second half here
        pairs = matrices.reshape(depth, count, width // heads // 2, 2, width)
        return pairs.transpose(0, 1, 3, 2, 4).reshape(matrices.shape)

    wte, cut = take(vocab, width), kv_heads * width // heads
    stacked = {"ln_1/scale": take(depth, width)}
    stacked["attention/q/kernel"] = halves(take(depth, width, width), heads)
    stacked["attention/k/kernel"] = halves(take(depth, cut, width), kv_heads)
    stacked |= {"attention/v/kernel": take(depth, cut, width), "attention/out/kernel": take(depth, width, width)}
    stacked |= {"ln_2/scale": take(depth, width), "mlp/gate/kernel": take(depth, inner, width)}
    stacked |= {"mlp/down/kernel": take(depth, width, inner), "mlp/up/kernel": take(depth, inner, width)}
    params = {f"block_{i}/{name}": jnp.array(values[i].T) for name, values in stacked.items() for i in range(depth)}
    params |= {"wte/embedding": jnp.array(wte), "ln_f/scale": jnp.array(take(width))}
    sizes = dict(vocab=vocab, length=length, width=width, depth=depth, heads=heads, kv_heads=kv_heads, inner=inner)
    return llama.Llama(llama.LlamaConfig(**sizes, eps=1e-5, tied=True)), unflatten_dict(params, sep="/")


def read_pieces(path: Path) -> list[bytes]:
    """llama2.c's vocabulary: the longest piece's length, then (score, length, bytes) of each."""
    content, at, pieces = path.read_bytes(), 4, []
    while at < len(content):
        _, size = struct.unpack_from("fi", content, at)
        pieces.append(content[at + 8 : at + 8 + size])
        at += 8 + size
    raw = re.compile(rb"<0x([0-9A-F]{2})>")
    return [bytes([int(byte[1], 16)]) if (byte := raw.fullmatch(piece)) else piece for piece in pieces]


def test_a_published_model_writes_its_published_text(tmp_path):
    """stories260K (Karpathy, tinyllamas): the greedy text that its author documents, word for word."""
    data = Path(os.environ.get("JAXDISTILL_DATA", "/nowhere")) / "stories260k"
    if not data.is_dir():
        pytest.skip("JAXDISTILL_DATA names no folder with stories260k/")
    module, params = read_llama2c(data / "stories260K.bin")
    llama.to_hf(module, params, tmp_path)
    again, params = from_hf(tmp_path)
    assert again == module
    pieces = read_pieces(data / "tok512.bin")
    assert len(pieces) == module.config.vocab
    following = jax.jit(lambda tokens, at: jnp.argmax(module.apply({"params": params}, tokens)[0][0, at]))
    tokens = np.zeros((1, 257), np.int32)
    tokens[0, 0] = 1
    for at in range(256):
        tokens[0, at + 1] = following(tokens, at)
    text = b"".join(pieces[token] for token in tokens[0, 1:]).decode()
    documented = (data / "stories260K.md").read_text().split("-t 0.0\n")[1].split("```")[0]
    assert text.split() == documented.split()
