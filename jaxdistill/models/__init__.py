"""Models: Linen modules whose weights come from, and go back to, Hugging Face folders."""

from jaxdistill import UserError
from jaxdistill.models import gpt2, hf, llama

_FAMILIES = {"gpt2": gpt2} | dict.fromkeys(llama.KINDS, llama)  # config.json's model_type -> its file here


def family(folder):
    """The file here (`gpt2` or `llama`) of the model in a Hugging Face `folder`. Raises `UserError` for a folder whose
    config cannot be read and for a `model_type` that is not supported."""
    kind = hf.read_config(folder).get("model_type")
    if kind not in list(_FAMILIES):
        accepted = ", ".join(sorted(_FAMILIES))
        raise UserError(f"{folder}/config.json: model_type: found {kind!r}; accepted: {accepted}")
    return _FAMILIES[kind]


def from_hf(folder, **options):
    """`(module, params)` of the model in a Hugging Face `folder`, whatever its `model_type` is.

    `options` (`dtype`, `remat`, `place`) go to the model's own `from_hf`. Raises `UserError` as `family` does, and for
    weights that are not as they should be.
    """
    return family(folder).from_hf(folder, **options)
