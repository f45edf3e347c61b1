"""A teacher of another tokenizer: three seeds of configs/kd.py:cross, without its slow baseline, and alm with the hidden term and without.

    python -m jaxdistill.main --config=experiments/cross/cross.py --workdir=workdir/cross
"""

from configs import kd


def get_config():
    config = kd.get_config("cross")
    config.seeds = (0, 1, 2)
    config.run.alm_hidden = dict(recipe="student_aware", hidden=dict(weight=kd.get_config().hidden.weight))
    config.run.projector.kd.weight = config.kd.weight
    del config.run.uld
    config.runs = (*(name for name in config.runs if name != "uld"), "alm_hidden")
    return config
