"""DCAL on handwritten characters: Omniglot's two small background sets, 242 characters of 8 alphabets, each by 20 drawers.

    python -m jaxdistill.main --config=configs/dcal_omniglot.py --workdir=workdir/omniglot --config.data.path=FILE.npz

data.path: an .npz of x uint8 [N, 28, 28] (ink 255), y [N] (character), drawer [N] (1 to 20), alphabet [N] (0 to 7, by name) and
class_names [242]. Trained on the drawers 1 to 10, tested on 11 to 20, whose hands were never seen;
chance is right in 0.4 %.

Variants, after a colon:
    :reid   characters as identities and drawers as cameras; Sanskrit and Tagalog, 59 characters, are the test's alone
"""

from ml_collections import ConfigDict

from jaxdistill.training.defaults import defaults

MODES = ("sa_only", "sa_glca", "sa_pwca", "full", "random_query", "noise_distractor")
SANSKRIT, TAGALOG = 6, 7


def get_config(variant: str = ""):
    if variant not in ("", "reid"):
        raise ValueError(f"configs/dcal_omniglot.py: found variant {variant!r}; accepted: reid")
    config = defaults()
    config.headline, config.monitor, config.minimize = "full", "validation/accuracy", False

    config.data = ConfigDict(dict(
        source="npz", path="", size=(28, 28), channels=1,
        group="drawer", test_groups=tuple(range(11, 21)), validation=0.1,
        rotate=7.0, shift=0.05, zoom=0.1, shear=8.0,
    ))
    config.model = ConfigDict(dict(
        path="", preset="tiny", patch=7, width=64, depth=3, heads=4,
        mean=(), std=(),             # of the normalisation; (): those of the training images
    ))
    config.dcal = ConfigDict(dict(queries=0.25, figures=6))
    config.loss = ConfigDict(dict(smoothing=0.0))
    config.kd = ConfigDict(dict(weight=((0.0, 0.0),)))
    # The other options, at their defaults: data/images.py, models/classifier.py and recipes/dcal.py say what each does.
    config.data.update(dict(
        task="", resize=(0, 0), classes=0, test=0.2, corrupt=0, workers=0, flip=False, resized_crop=0.0, jitter=0.0, erasing=0.0,
        erasing_fill="pixels", camera="", per_class=100, test_per_class=20, test_families=(), seed=0,
    ))
    config.model.update(dict(drop_path=0.0, dtype="float32", remat=False, head="new"))
    config.dcal.update(dict(
        cls_query=True, readout="mean", attach=0, pwca_head="shared", weighting="learned", bounds=(), weight_lr=1.0, rerank=False,
    ))
    config.loss.update(dict(triplet=((0.0, 1.0),), margin=0.3, identities=16))
    config.kd.update(dict(temperature=((0.0, 1.0),), kind="forward_kl", beta=0.5, alpha=0.1))
    config.teacher = ConfigDict(dict(
        path="", preset="tiny", patch=0, width=0, depth=0, heads=0, drop_path=0.0, dtype="float32", remat=False, mean=(), std=(),
        head="new", cache="",
    ))
    config.optimizer.update(dict(weight_decay=0.05, b2=0.98))
    config.train.update(dict(steps=3700, batch=32, lr=4e-3, eval_every=500, checkpoint_every=500, log_every=20))
    config.runs = ("sa_only", "full")
    config.run = ConfigDict({mode: dict(recipe="dcal", dcal=dict(mode=mode)) for mode in MODES})

    if variant == "reid":
        config.monitor = "validation/mAP"
        config.data.update(dict(task="reid", group="alphabet", test_groups=(SANSKRIT, TAGALOG), camera="drawer"))
        config.loss.update(dict(triplet=((0.0, 0.0), (0.25, 0.0), (0.5, 1.0)), margin=0.3, identities=16))  # with 2 drawings of each
    return config
