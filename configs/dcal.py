"""Dual cross-attention on look-alike letters, from nothing but this machine.

    python -m jaxdistill.main --config=configs/dcal.py --workdir=workdir/dcal
"""

from ml_collections import ConfigDict

from jaxdistill.training.defaults import defaults

MODES = ("sa_only", "sa_glca", "sa_pwca", "full", "random_query", "noise_distractor")


def get_config(variant: str = ""):
    config = defaults()
    config.headline, config.monitor, config.minimize = "full", "validation/accuracy", False

    config.data = ConfigDict(dict(
        source="glyphs", path="", size=(32, 32), channels=1, classes=150,
        per_class=32, test_per_class=12, test_families=("serif",), validation=0.1,
        rotate=6.0, shift=0.04, zoom=0.08, shear=4.0,
    ))
    config.model = ConfigDict(dict(path="", preset="tiny", patch=8, width=64, depth=3, heads=4, drop_path=0.0))
    config.dcal = ConfigDict(dict(queries=0.25, figures=6))
    config.loss = ConfigDict(dict(smoothing=0.0))
    config.kd = ConfigDict(dict(weight=((0.0, 0.0),)))
    config.optimizer.weight_decay = 0.05
    config.train.update(dict(steps=1000, batch=32, lr=4e-3, eval_every=500, checkpoint_every=500, log_every=10))
    config.runs = ("sa_only", "full")
    config.run = ConfigDict({mode: dict(recipe="dcal", dcal=dict(mode=mode)) for mode in MODES})
    return config
