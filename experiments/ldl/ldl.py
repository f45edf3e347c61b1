"""soft_label against softmax regression in ten folds, settings chosen inside each: nothing that is reported has seen its test rows.

    python -m jaxdistill.main --config=experiments/ldl/ldl.py:choose --config.data.path=DIR/SJAFFE.mat --workdir=workdir/sjaffe_choose
    python -m jaxdistill.main --config=experiments/ldl/ldl.py:final --config.data.path=DIR/SJAFFE.mat --workdir=workdir/sjaffe_final
    python experiments/ldl/paired.py workdir/sjaffe_final workdir/sjaffe_choose

The seed is the fold, of both jobs the same. choose: every setting of both models, trained without a fifth of the training rows, which
measures it; choose_1 to choose_4 without each of the other fifths, for sets so small that one of them tells little. final: every setting,
trained on all of them. paired.py takes of each fold the final row of the setting that was best in `choose`, of either model.
"""

from configs import soft_label

STRENGTHS = {"softmax_001": 0.001, "softmax_003": 0.003, "softmax_01": 0.01, "softmax_03": 0.03, "softmax_1": 0.1, "softmax_3": 0.3}
SETTINGS = {  # -> (widths, norm, input dropout, dropout, updates, weight decay)
    "mlp_long": ((128,), "none", 0.5, 0.7, 1000, 0.01), "mlp_decay": ((128,), "none", 0.5, 0.7, 1000, 3.0),
    "mlp_light": ((256,), "none", 0.1, 0.5, 1000, 0.01), "mlp_deep": ((256, 256), "layer", 0.3, 0.5, 600, 0.01),
}  # fmt: skip
JOBS = ("final", "choose", "choose_1", "choose_2", "choose_3", "choose_4")


def get_config(job: str = "final"):
    if job not in JOBS:
        raise ValueError(f"experiments/ldl/ldl.py: found {job!r}; accepted: {', '.join(JOBS)}")
    config = soft_label.get_config("ldl")
    config.data.validation = 0.0 if job == "final" else 0.2
    if fold := max(JOBS.index(job) - 1, 0):
        config.data.validation_fold = fold
    config.headline, config.optimizer.weight_decay = "", 0.01
    config.train.update(dict(eval_every=10_000, checkpoint_every=10_000, log_every=100, lr=3e-3))  # measured once, at the end
    floor = lambda strength: dict(config.run.softmax) | dict(floor=dict(data="distributions", kind="softmax", strength=strength))  # noqa: E731
    runs = {"constant": dict(config.run.constant)} | {name: floor(strength) for name, strength in STRENGTHS.items()}
    for name, (widths, norm, inputs, hidden, steps, decay) in SETTINGS.items():
        mlp = dict(hidden=widths, norm=norm, dropout=hidden, input_dropout=inputs)
        runs[name] = dict(recipe="soft_label", model=dict(kind="mlp", mlp=mlp), train=dict(steps=steps),
                          optimizer=dict(weight_decay=decay))  # fmt: skip
    del config.model.mlp, config.train.steps  # each run's own
    config.run, config.runs = runs, tuple(runs)
    return config
