"""Does it pay that the student learns on what it writes itself? The main job's kd with GKD's lambda at 0, 0.25 and 0.5.

    python -m jaxdistill.main --config=experiments/on_policy/study.py --workdir=workdir/on_policy
    python -m experiments.on_policy.quality workdir/on_policy

The job of configs/kd.py at a half of its size, logits alone. `kd_same_seconds`: offline, for as many updates as take the seconds of
`mix_50`, by what `bench.py --steps` measures. The variant `reverse` has reverse KL in place of forward KL.
"""

from configs import kd

COST = 1.73  # an update on a sampled batch, in updates on text (bench.py --steps)


def get_config(variant: str = ""):
    if variant not in ("", "reverse"):
        raise ValueError(f"experiments/on_policy/study.py: found variant {variant!r}; accepted: reverse")
    config = kd.get_config()
    config.seeds, config.headline = (0, 1, 2), "kd"
    config.data.vocab, config.data.length, config.on_policy.prompt = 512, 64, 16
    config.student.width, config.run.teacher.model.width = 64, 96
    config.train.steps, config.train.eval_every = 400, 100
    config.hidden.weight = ((0.0, 0.0),)
    config.kd.kind = "reverse_kl" if variant else "forward_kl"
    mix = {f"mix_{percent}": dict(on_policy=dict(fraction=((0.0, percent / 100),))) for percent in (25, 50)}
    longer = dict(kd_same_seconds=dict(train=dict(steps=round(config.train.steps * (1 + 0.5 * (COST - 1))))))
    run = dict(kd={}) | mix | longer
    config.run = dict(teacher=config.run.teacher, **{name: dict(recipe="student_aware", **change) for name, change in run.items()})
    config.runs = ("teacher", "kd", *mix, "kd_same_seconds")
    return config
