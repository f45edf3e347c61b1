"""Fifty classes, ten examples of each or five: what document 000 calls "accuracy of 2-8 %, expected with limited data".

    python -m jaxdistill.main --config=experiments/reservoir_document_000/small.py:leaf --config.data.path=DIR/leaf99/train.csv
    ... :choose   --config.data.path=DIR/esc50_spec   five folds inside the 500 training clips, for leak, radius and input scale
    ... :esc50    --config.data.path=DIR/esc50_spec   the setting that was best there, on the 400 clips of the test
    ... :omniglot --config.data.path=DIR/omniglot/omniglot_small12_28.npz
    ... :cnn      --config.data.path=DIR/omniglot/omniglot_small12_28.npz   a convolutional network on the same drawings

Rows: the floors (logistic regression at three strengths), the readout with KAF and with ReLU, of leaf also ELU and GELU and each without
its LayerNorms, and what document 000 trained with: leak 0.3, radius 0.95, input scale 0.5. Five seeds; of leaf and `choose` the seed is
the split too.
"""

from configs import dcal_omniglot, reservoir

ACTIVATIONS = ("kaf", "relu", "elu", "gelu")
DOCUMENT = dict(leak=(0.3, 0.3), radius=0.95, input_scale=0.5)
SETTINGS = {  # what `choose` chooses from, beside the document's
    "fast_low_015": dict(leak=(1.0, 1.0), radius=0.5, input_scale=0.15), "fast_low_05": dict(leak=(1.0, 1.0), radius=0.5, input_scale=0.5),
    "slow_high_015": dict(leak=(0.3, 0.3), radius=0.95, input_scale=0.15),
}  # fmt: skip


def cnn():
    config = dcal_omniglot.get_config()
    config.seeds, config.headline = (0, 1, 2, 3, 4), ""
    config.data.update(dict(classes=50, validation=0.0))
    config.train.update(dict(lr=1e-3, steps=600))
    config.run, config.runs = dict(cnn=dict(recipe="experiments.dcal_ablation.cnn")), ("cnn",)
    for section in ("model", "dcal", "loss", "kd"):
        del config[section]
    return config


def get_config(data: str = "leaf"):
    if data == "cnn":
        return cnn()
    config = reservoir.get_config("esc50" if data == "choose" else data)
    config.seeds = (0, 1, 2, 3, 4)
    config.train.checkpoint_every = config.train.eval_every = 10_000

    def model(activation="kaf", norm=True, **more):
        return dict(recipe="reservoir", readout=dict(activation=activation, **({} if norm else dict(norm=False))), **more)

    document = model(reservoir=DOCUMENT)
    if data == "choose":
        config.data.update(dict(validation=0.2, fold=-1))
        config.headline = ""
        for key in DOCUMENT:  # each run has its own
            del config.reservoir[key]
        config.run = {name: model(reservoir=changes) for name, changes in SETTINGS.items()} | dict(document=document)
        config.runs = (*SETTINGS, "document")
        return config
    floor = lambda kind, **more: dict(config.run.constant) | dict(floor=dict(data="sequences", kind=kind, **more))  # noqa: E731
    runs = dict(constant=floor("constant"), one_nn=floor("nearest"), logistic_weak=floor("logistic", strength=1e-4),
                logistic=floor("logistic", strength=1e-2), logistic_strong=floor("logistic", strength=1.0))  # fmt: skip
    if data == "leaf":
        config.data.seed = -1
        runs = {name: run | dict(once=False) for name, run in runs.items()}
    for activation in ACTIVATIONS if data == "leaf" else ("kaf", "relu"):
        runs |= {activation: model(activation)} | ({f"{activation}_no_norm": model(activation, norm=False)} if data == "leaf" else {})
    config.run = runs | dict(document=document)
    config.runs = (*runs, "document")
    return config
