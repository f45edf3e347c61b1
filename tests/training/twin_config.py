"""The jobs of two processes: python -m jaxdistill.main --config=tests/training/twin_config.py[:pair]"""

from tests import jobs


def get_config(variant: str = ""):
    config = jobs.pair(fit=True) if variant == "pair" else jobs.toy()
    config.mesh = (4, 2, 1)
    return config
