"""What the documents claim of schedules and subsets, on the main job: three seeds.

    python -m jaxdistill.main --config=experiments/claims/claims.py --workdir=workdir/claims

Logits alone, without the feature terms. warm_up: kd 0.1 -> 0.7 over the first fifth of the updates, against `constant`, 0.7
throughout. hot: T 2.0 -> 1.5, against T = 1 of `kd`. top_64: the teacher's 64 best ids and one tail bucket, of 2,048.
"""

from configs import kd


def get_config():
    config = kd.get_config()
    config.seeds = (0, 1, 2)
    config.hidden.weight = ((0.0, 0.0),)
    runs = {
        "warm_up": dict(weight=((0.0, 0.1), (0.2, 0.7))),
        "constant": dict(weight=((0.0, 0.7),)),
        "hot": dict(temperature=((0.0, 2.0), (1.0, 1.5))),
        "top_64": dict(kind="topk_kl", top_k=64),
    }
    for name, change in runs.items():
        config.run[name] = dict(recipe="student_aware", kd=change)
    del config.run.untouched, config.run.ce_only_same_seconds
    config.runs = ("teacher", "ce_only", "kd", *runs)
    return config
