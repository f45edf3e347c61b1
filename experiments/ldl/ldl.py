"""soft_label against softmax regression in ten folds, settings chosen inside each: nothing that is reported has seen its test rows.

    python -m jaxdistill.main --config=experiments/ldl/ldl.py:choose --config.data.path=DIR/SJAFFE.mat --workdir=workdir/sjaffe_choose
    python -m jaxdistill.main --config=experiments/ldl/ldl.py:final --config.data.path=DIR/SJAFFE.mat --workdir=workdir/sjaffe_final
    python experiments/ldl/paired.py workdir/sjaffe_choose workdir/sjaffe_final

The seed is the fold, of both jobs the same. choose: every setting of both models, trained without a fifth of the training rows, which
measures it. final: every setting, trained on all of them. paired.py takes of each fold the final row of the setting that was best in
`choose`, of either model.
"""

from configs import soft_label

STRENGTHS = {"softmax_003": 0.003, "softmax_01": 0.01, "softmax_03": 0.03, "softmax_1": 0.1, "softmax_3": 0.3}
SETTINGS = {  # -> (input dropout, dropout, width, updates, weight decay)
    "mlp_30_50": (0.3, 0.5, 64, 300, 0.01), "mlp_30_70": (0.3, 0.7, 64, 300, 0.01), "mlp_30_50_decay": (0.3, 0.5, 64, 600, 1.0),
    "mlp_10_30_wide": (0.1, 0.3, 128, 1000, 0.01),
}  # fmt: skip


def get_config(job: str = "final"):
    if job not in ("choose", "final"):
        raise ValueError(f"experiments/ldl/ldl.py: found {job!r}; accepted: choose, final")
    config = soft_label.get_config("ldl")
    config.data.validation = 0.2 if job == "choose" else 0.0
    config.train.eval_every = config.train.checkpoint_every = 10_000
    config.headline, config.train.steps, config.train.lr = "", 300, 3e-3
    floor = lambda strength: dict(config.run.softmax) | dict(floor=dict(data="distributions", kind="softmax", strength=strength))  # noqa: E731
    runs = {"constant": dict(config.run.constant)} | {name: floor(strength) for name, strength in STRENGTHS.items()}
    for name, (inputs, hidden, width, steps, decay) in SETTINGS.items():
        mlp = dict(hidden=(width,), dropout=hidden, input_dropout=inputs)
        runs[name] = dict(recipe="soft_label", model=dict(kind="mlp", mlp=mlp), optimizer=dict(weight_decay=decay))
        if steps != config.train.steps:
            runs[name]["train"] = dict(steps=steps)
    config.model.mlp = dict(norm="none")
    config.run, config.runs = runs, tuple(runs)
    return config
