"""A teacher of another tokenizer: three seeds of configs/kd.py:cross, with one more way to begin the projector.

    python -m jaxdistill.main --config=experiments/cross/cross.py --workdir=workdir/cross
"""

from configs import kd


def get_config():
    config = kd.get_config("cross")
    config.seeds = (0, 1, 2)
    config.run.projector_random = dict(recipe="student_aware", projector=dict(init="orthogonal"))
    config.runs = tuple(name for name in config.runs if name != "uld") + ("projector_random",)
    del config.run.uld
    return config
