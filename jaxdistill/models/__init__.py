"""Models: Linen modules whose weights come from, and go back to, Hugging Face folders."""

from jaxdistill import UserError
from jaxdistill.models import gpt2, hf

_FROM_HF = {"gpt2": gpt2.from_hf}  # config.json's model_type -> loader


def from_hf(folder, **options):
    """`(module, params)` of the model in a Hugging Face `folder`, whatever its `model_type` is.

    `options` (`dtype`, `remat`) go to the model's own `from_hf`. Raises `UserError` for a folder that
    cannot be read and for a `model_type` that is not supported.
    """
    kind = hf.read_config(folder).get("model_type")
    if kind not in list(_FROM_HF):
        accepted = ", ".join(sorted(_FROM_HF))
        raise UserError(f"{folder}/config.json: model_type: found {kind!r}; accepted: {accepted}")
    return _FROM_HF[kind](folder, **options)
