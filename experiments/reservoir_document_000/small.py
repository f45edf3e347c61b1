"""Fifty classes, ten examples of each or five: what document 000 calls "accuracy of 2-8 %, expected with limited data".

    python -m jaxdistill.main --config=experiments/reservoir_document_000/small.py:leaf --config.data.path=DIR/leaf99/train.csv
    ... :choose   --config.data.path=DIR/esc50_spec   five folds inside the 500 training clips
    ... :esc50    --config.data.path=DIR/esc50_spec   the setting that was chosen there, on the 400 clips of the test
    ... :choose_omniglot --config.data.path=DIR/omniglot/omniglot_small12_28.npz   two of the ten training drawers held out at a time
    ... :omniglot --config.data.path=DIR/omniglot/omniglot_small12_28.npz   the setting that was chosen there, on ten other drawers
    ... :cnn      --config.data.path=DIR/omniglot/omniglot_small12_28.npz   a convolutional network on the same drawings

Rows: the floors (logistic regression at three strengths), the readout with KAF and with ReLU, of leaf also ELU and GELU and each without
its LayerNorms, and what document 000 trained with: leak 0.3, radius 0.95, input scale 0.5. Five seeds; of leaf the seed is
the split too, of `choose` the fold.
"""

from configs import dcal_omniglot, reservoir

ACTIVATIONS = ("kaf", "relu", "elu", "gelu")
DOCUMENT = dict(leak=(0.3, 0.3), radius=0.95, input_scale=0.5)
CHOICES = {  # what is chosen from, beside the document's reservoir: what configs/reservoir.py has, and one change each
    "choose": {
        "chosen": {}, "raw": dict(readout=dict(standardise=False)), "three": dict(readout=dict(statistics=("mean", "max", "std"))),
        "decay_001": dict(optimizer=dict(weight_decay=0.01)), "input_03": dict(reservoir=dict(input_scale=0.3)),
        "large": dict(readout=dict(hidden=256, pieces=5, width=128)),
    },
    "choose_omniglot": {
        "chosen": {}, "statistics": dict(readout=dict(parts=("statistics",), standardise=True)),
        "both": dict(readout=dict(parts=("statistics", "convolution"), standardise=True)),
        "fast": dict(reservoir=dict(leak=(1.0, 1.0), radius=0.5)), "decay_001": dict(optimizer=dict(weight_decay=0.01)),
    },
}  # fmt: skip


def cnn():
    config = dcal_omniglot.get_config()
    config.seeds, config.headline = (0, 1, 2, 3, 4), ""
    config.data.update(dict(classes=50, validation=0.0))
    config.train.update(dict(lr=1e-3, steps=2500))  # as in dcal_ablation
    config.run, config.runs = dict(cnn=dict(recipe="experiments.dcal_ablation.cnn")), ("cnn",)
    for section in ("model", "dcal", "loss", "kd", "teacher"):
        del config[section]
    return config


def get_config(data: str = "leaf"):
    if data == "cnn":
        return cnn()
    config = reservoir.get_config({"choose": "esc50", "choose_omniglot": "omniglot"}.get(data, data))
    config.seeds = (0, 1, 2, 3, 4)
    config.train.checkpoint_every = config.train.eval_every = 10_000

    def model(activation="kaf", **changes):
        return dict(recipe="reservoir") | changes | dict(readout=dict(activation=activation) | changes.get("readout", {}))

    document = model(reservoir=DOCUMENT)
    if data in CHOICES:
        config.data.update(dict(validation=0.2, fold=-1))
        config.headline = ""
        config.run = {name: model(**changes) for name, changes in CHOICES[data].items()} | dict(document=document)
        config.runs = (*CHOICES[data], "document")
        return config
    floor = lambda kind, **more: dict(config.run.constant) | dict(floor=dict(data="sequences", kind=kind, **more))  # noqa: E731
    runs = dict(constant=floor("constant"), one_nn=floor("nearest"), logistic_weak=floor("logistic", strength=1e-4),
                logistic=floor("logistic", strength=1e-2), logistic_strong=floor("logistic", strength=1.0))  # fmt: skip
    if data == "leaf":
        config.data.seed = -1
        runs = {name: run | dict(once=False) for name, run in runs.items()}
    for activation in ACTIVATIONS if data == "leaf" else ("kaf", "relu"):
        runs |= {activation: model(activation)}
        runs |= {f"{activation}_no_norm": model(activation, readout=dict(norm=False))} if data == "leaf" else {}
    config.run = runs | dict(document=document)
    config.runs = (*runs, "document")
    return config
