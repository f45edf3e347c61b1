"""DCAL for re-identification on Market-1501, with the published hyper-parameters, from a pretrained ViT or DeiT.

    python -m jaxdistill.main --config=configs/dcal_market1501.py --workdir=workdir/market \\
        --config.data.path=DIR/Market-1501-v15.09.15 --config.model.path=DIR/vit-base-patch16-224-in21k

data.path: the folder that the archive unpacks to. model.path: a Hugging Face ViT or DeiT folder or one of Google's .npz files
(ViT-B_16.npz). For a GPU of 40 GiB or more; --dry_run prints the memory and FLOPs that it predicts. Not measured here: neither
the pictures nor such weights were at hand. Published (mAP / rank-1, both from ImageNet weights, the second with DCAL):

                DeiT-T                       ViT-B
    Market      77.9 / 90.3   79.8 / 91.8    87.1 / 94.3   87.5 / 94.7
    :duke       69.5 / 82.9   71.7 / 84.9    78.9 / 89.4   80.1 / 89.0      DukeMTMC-reID
    :msmt17     42.1 / 63.9   44.9 / 68.2    61.6 / 81.4   64.0 / 83.1      MSMT17, V1 or V2
    :veri776    71.3 / 94.3   74.1 / 94.7    78.1 / 96.0   80.2 / 96.9      VeRi-776, vehicles, 256 x 256

As published there is no validation split: nothing is chosen, and the last parameters meet the test images once. Set
--config.data.validation=0.1 before trying anything out: that share of the identities is then held out. mAP is the mean precision at
the matches; Market's own script takes the trapezoid between them, which is a little less.

What GLCA classifies is the mean of its queries (dcal.readout): the paper reads CLS, with which the choice of the queries changes nothing
(see models/dcal.py). --config.dcal.readout=cls is the paper's letter.
"""

from ml_collections import ConfigDict

from jaxdistill.training.defaults import defaults

TRAINING_IMAGES = {"": 12_936, "duke": 16_522, "msmt17": 32_621, "veri776": 37_778}
EPOCHS = 120
IDENTITIES, IMAGES = 16, 4  # in a batch


def get_config(variant: str = ""):
    if variant not in TRAINING_IMAGES:
        raise ValueError(f"configs/dcal_market1501.py: found variant {variant!r}; accepted: duke, msmt17, veri776")
    config = defaults()
    config.headline, config.monitor, config.minimize = "full", "validation/mAP", False
    height, width = (256, 256) if variant == "veri776" else (256, 128)

    config.data = ConfigDict(dict(
        source=variant or "market1501", path="", channels=3,
        size=(height, width), shift=0.04,  # by 10 pixels at most, in training; the test sees whole pictures
        flip=True, erasing=0.5, erasing_fill="pixels", validation=0.0,
        corrupt=0, workers=8,        # unreadable pictures that may be left out; processes that read and augment
    ))
    config.model = ConfigDict(dict(
        path="", preset="vit_base",  # preset: of a fresh model only
        drop_path=0.1, dtype="bfloat16", remat=True, mean=(), std=(),  # (): those of the folder
    ))
    config.dcal = ConfigDict(dict(readout="mean", queries=0.3, figures=8, rerank=False))
    config.loss = ConfigDict(dict(smoothing=0.0, triplet=((0.0, 1.0),), margin=0.3, identities=IDENTITIES))
    # The other options, at their defaults: data/images.py, models/classifier.py and recipes/dcal.py say what each does.
    config.data.update(dict(
        task="", resize=(0, 0), classes=0, test=0.2, rotate=0.0, zoom=0.0, shear=0.0, resized_crop=0.0, jitter=0.0, group="",
        test_groups=(), camera="", per_class=100, test_per_class=20, test_families=(), seed=0,
    ))
    config.model.update(dict(patch=0, width=0, depth=0, heads=0, head="new"))
    config.dcal.update(dict(cls_query=True, attach=0, pwca_head="shared", weighting="learned", bounds=(), weight_lr=1.0))
    config.kd = ConfigDict(dict(weight=((0.0, 0.0),), temperature=((0.0, 1.0),), kind="forward_kl", beta=0.5, alpha=0.1))
    config.teacher = ConfigDict(dict(
        path="", preset="tiny", patch=0, width=0, depth=0, heads=0, drop_path=0.0, dtype="float32", remat=False, mean=(), std=(),
        head="new", cache="",
    ))
    config.optimizer.update(dict(name="sgd", momentum=0.9, weight_decay=1e-4, decay="coupled", clip=0.0))
    batch = IDENTITIES * IMAGES
    steps = EPOCHS * TRAINING_IMAGES[variant] // batch
    config.train.update(dict(
        steps=steps, batch=batch, lr=0.008, warmup=0.05,  # the paper tells of no warm-up; ViTs under SGD want one
        eval_every=steps // 20, checkpoint_every=500, log_every=50,
    ))
    config.runs = ("sa_only", "full")
    config.run = ConfigDict({mode: dict(recipe="dcal", dcal=dict(mode=mode)) for mode in ("sa_only", "sa_glca", "sa_pwca", "full")})
    return config
