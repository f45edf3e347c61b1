"""A big classifier -> a tiny one, on look-alike letters, from nothing but this machine.

    python -m jaxdistill.main --config=configs/dcal_distill.py --workdir=workdir/dcal_distill

The teacher, 96 wide and 6 deep with both branches of DCAL, sees 64 drawings of each letter (and is kept for later jobs); then a
plain ViT, 48 wide and 2 deep, that may see only 16 of each learns from what the teacher's branches say together, beside the same
student without a teacher, for the same updates and for the same seconds. Five minutes on two CPU cores, of which the teacher takes
three. Of the test letters (one seed) the teacher knows 83 %; after 1,000 updates the student 61 %, without a teacher 49 %, without one for
the same seconds, which are 2.3 times the updates, 72 %; after 2,500 updates (--config.train.steps=2500) 79, 73 and 86 %: an update
with a teacher teaches more, and where drawings can be augmented without end, an update without one costs so much less that it wins.

A teacher of your own, which is then measured and not trained: --config.teacher.path=DIR, a folder that a run of this project
exported, or of a Hugging Face ViT with a head for these classes.
"""

from ml_collections import ConfigDict

from jaxdistill.training.defaults import defaults


def get_config():
    config = defaults()
    config.headline, config.monitor, config.minimize = "kd", "validation/accuracy", False

    config.data = ConfigDict(dict(
        source="glyphs", path="", size=(32, 32), channels=1, classes=150,
        per_class=16, test_per_class=12, test_families=("serif",), validation=0.1,
        rotate=6.0, shift=0.04, zoom=0.08, shear=4.0,
    ))
    config.model = ConfigDict(dict(path="", patch=8, width=48, depth=2, heads=3, head="new"))
    config.dcal = ConfigDict(dict(mode="sa_only"))   # what is deployed is a plain ViT, which transformers reads
    config.loss = ConfigDict(dict(smoothing=0.0))
    config.kd = ConfigDict(dict(
        weight=((0.0, 1.0),),      # beside the cross-entropy, whose weight is 1
        temperature=((0.0, 2.0),),
        kind="forward_kl",         # forward_kl | reverse_kl | jsd | skew_kl | skew_reverse_kl | total_variation
        beta=0.5, alpha=0.1,       # of jsd, of the skew ones
    ))
    config.teacher = ConfigDict(dict(path="", dtype="float32", cache=""))  # cache: of python -m jaxdistill.cache, read in its place
    # The other options, at their defaults: data/images.py, models/classifier.py and recipes/dcal.py say what each does.
    config.data.update(dict(
        task="", resize=(0, 0), test=0.2, corrupt=0, workers=0, flip=False, resized_crop=0.0, jitter=0.0, erasing=0.0,
        erasing_fill="pixels", group="", test_groups=(), camera="", seed=0,
    ))
    config.model.update(dict(preset="tiny", drop_path=0.0, dtype="float32", remat=False, mean=(), std=()))
    config.dcal.update(dict(
        queries=0.1, cls_query=True, readout="mean", attach=0, pwca_head="shared", weighting="learned", bounds=(), weight_lr=1.0,
        figures=0, rerank=False,
    ))
    config.loss.update(dict(triplet=((0.0, 1.0),), margin=0.3, identities=16))
    config.teacher.update(dict(
        preset="tiny", patch=0, width=0, depth=0, heads=0, drop_path=0.0, remat=False, mean=(), std=(), head="new",
    ))
    config.optimizer.weight_decay = 0.05
    config.train.update(dict(steps=1000, batch=32, lr=4e-3, eval_every=500, checkpoint_every=500, log_every=10))

    off = dict(kd=dict(weight=((0.0, 0.0),)))
    # The runs, in order. What a run does not name is as above.
    config.runs = ("teacher", "untouched", "ce_only", "kd", "ce_only_same_seconds")
    config.run = ConfigDict(dict(
        teacher=dict(
            recipe="dcal", once=True, cached=True, fills="teacher.path", given="model.path",
            # Sizes of 0: those of the preset, or of the folder that is given; "stored" is of the folder alone.
            model=dict(preset="tiny", patch=0, width=0, depth=0, heads=0, head="stored"),
            dcal=dict(mode="full", queries=0.25, figures=6), data=dict(per_class=64),
            train=dict(steps=2000, lr=2e-3), **off),
        untouched=dict(recipe="dcal", train=dict(steps=0), **off),
        ce_only=dict(recipe="dcal", **off),
        kd=dict(recipe="dcal"),
        ce_only_same_seconds=dict(recipe="dcal", seconds_of="kd", pace_of="ce_only", **off),
    ))
    return config
