"""A tokenizer by name: a folder, a tokenizer.json, or a name on the Hugging Face hub. Never runs code that came with it."""

import functools
import os
from pathlib import Path

import tokenizers

from jaxdistill import UserError, hub, read_json

END = "<|endoftext|>"


def find(name: str) -> tuple[tokenizers.Tokenizer, str | None, str | None]:
    """(backend, bos token, eos token) of the tokenizer `name`.

    Raises:
      UserError: not found, not readable, offline, or without a fast tokenizer. (`tokenizer.load` puts the name before it.)
    """
    path = os.path.expanduser(name)
    file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    if os.path.isfile(file):
        try:
            backend = tokenizers.Tokenizer.from_file(file)
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"{file} is not a tokenizer.json ({error})") from None
        return backend, *_marks(os.path.dirname(file), backend)
    if os.path.isdir(path):  # vocab.json and merges.txt, tokenizer.model, ...
        fast = _auto(name, path, local_files_only=True)
    elif os.path.isabs(path) or name.startswith(".") or name.endswith(".json") or name.count("/") > 1:
        raise UserError("not found; a folder, a tokenizer.json or a hub name is accepted")
    else:
        try:
            fast = hub.fetch(functools.partial(_auto, name, name))
        except UserError as error:
            raise UserError(f"no such folder or file; of the hub: {error}; a local folder is accepted") from None
    backend = getattr(fast, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"a {type(fast).__name__}, not a fast one; one with tokenizer.json is accepted")
    return backend, fast.bos_token, fast.eos_token


def _marks(folder: str, backend) -> tuple[str | None, str | None]:
    """(bos, eos) by the files beside tokenizer.json, else <|endoftext|> where the vocabulary has it."""
    marks = {}
    for path in (Path(folder, "special_tokens_map.json"), Path(folder, "tokenizer_config.json")):
        found = read_json(path) if path.exists() else {}
        for mark in ("bos_token", "eos_token"):
            if token := found.get(mark):
                token = token.get("content") if isinstance(token, dict) else token
                if not isinstance(token, str):
                    raise UserError(f"{path}: {mark}: found {found[mark]!r}; accepted: a token's text")
                marks[mark] = token
    if not marks and backend.token_to_id(END) is not None:
        return END, END
    return marks.get("bos_token"), marks.get("eos_token")


def _auto(name: str, where: str, **options):
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(first) from None
    except Exception as error:  # what damaged files make it raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"not readable by transformers ({type(error).__name__}: {first})") from None
