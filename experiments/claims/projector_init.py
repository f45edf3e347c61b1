"""How the projector begins, and what the first KL says of it: 40 updates of configs/kd.py:cross for each initialisation.

    python -m jaxdistill.main --config=experiments/claims/projector_init.py --workdir=workdir/projector_init
"""

from configs import kd

INITS = ("normal", "kaiming_uniform", "orthogonal", "heads")


def get_config():
    config = kd.get_config("cross")
    config.headline = ""
    config.kd.mode = "projector"
    config.train.steps, config.train.eval_every = 40, 10
    config.run = dict(teacher=config.run.teacher, **{name: dict(recipe="student_aware", projector=dict(init=name)) for name in INITS},
                      lstsq=dict(recipe="student_aware"))
    config.runs = ("teacher", *INITS, "lstsq")
    return config
