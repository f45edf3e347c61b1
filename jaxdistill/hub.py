"""The Hugging Face hub, as far as it is there: what was downloaded before needs no network, and none is waited for."""

import os
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from jaxdistill import UserError


def fetch(get: Callable[..., Any]) -> Any:
    """get(local_files_only=True), or where that is a UserError and the hub answers, get()."""
    try:
        return get(local_files_only=True)
    except UserError:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE") or not _reachable(endpoint):
            raise UserError(f"not downloaded, and {endpoint} is out of reach (offline)") from None
    return get()


def _reachable(endpoint: str) -> bool:
    """One quick look: without it, the hub's client retries for about a minute before it says that there is no network."""
    try:
        with urllib.request.urlopen(endpoint, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
