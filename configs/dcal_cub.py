"""DCAL on CUB-200-2011, with the published hyper-parameters, from a pretrained ViT or DeiT.

    python -m jaxdistill.main --config=configs/dcal_cub.py --workdir=workdir/cub \\
        --config.data.path=DIR/CUB_200_2011 --config.model.path=DIR/vit-base-patch16-224-in21k

data.path: the folder that the archive unpacks to. model.path: a Hugging Face ViT or DeiT folder (config.json, model.safetensors)
or one of Google's .npz files (ViT-B_16.npz); its head is replaced and its positions are resized to 448 x 448. For a GPU of 40 GiB
or more; --dry_run prints the memory and FLOPs that it predicts. Not measured here: neither the pictures nor such weights were at hand.

Without pretrained weights (--config.model.path='' --config.model.preset=deit_tiny) do not expect to see an effect: from scratch a
network gets about 50 % on CUB. The published figures (top-1: DeiT-T 82.1 -> 84.6, ViT-B 90.8 -> 91.4) start from ImageNet, those
of ViT-B from ImageNet-21k; 91 % without the latter is out of reach of any loss.

As published there is no validation split: nothing is chosen, and the last parameters meet the test images once. Set
--config.data.validation=0.1 before trying anything out.

What GLCA classifies is the mean of its queries (dcal.readout): the paper reads CLS, with which the choice of the queries changes nothing
(see models/dcal.py). --config.dcal.readout=cls is the paper's letter.

Variants, after a colon:
    :cars       Stanford Cars       (published: ViT-B 92.5 -> 93.4)
    :aircraft   FGVC-Aircraft       (published: ViT-B 90.0 -> 91.5)
"""

from ml_collections import ConfigDict

from jaxdistill.training.defaults import defaults

TRAINING_IMAGES = {"": 5994, "cars": 8144, "aircraft": 6667}
EPOCHS = 100
BATCH = 16


def get_config(variant: str = ""):
    if variant not in TRAINING_IMAGES:
        raise ValueError(f"configs/dcal_cub.py: found variant {variant!r}; accepted: cars, aircraft")
    config = defaults()
    config.headline, config.monitor, config.minimize = "full", "validation/accuracy", False

    config.data = ConfigDict(dict(
        source=variant or "cub", path="", channels=3, classes=0,  # 0: all
        resize=(550, 550), size=(448, 448),  # random crop in training, centre crop in the test
        flip=True, validation=0.0,
        corrupt=0, workers=8,        # unreadable pictures that may be left out; processes that read and augment
    ))
    config.model = ConfigDict(dict(
        path="", preset="vit_base",  # preset: of a fresh model only
        drop_path=0.1, dtype="bfloat16", remat=True, mean=(), std=(),  # (): those of the folder
    ))
    config.dcal = ConfigDict(dict(
        readout="mean", queries=0.1,  # 78 of the 784 patches
        weight_lr=50.0,              # of the learned loss weights: at the backbone's rate AdamW moves them by no more than 0.3 in all
        figures=8,
    ))
    config.loss = ConfigDict(dict(smoothing=0.0))
    config.kd = ConfigDict(dict(weight=((0.0, 0.0),)))
    # The other options, at their defaults: data/images.py, models/classifier.py and recipes/dcal.py say what each does.
    config.data.update(dict(
        task="", test=0.2, rotate=0.0, shift=0.0, zoom=0.0, shear=0.0, resized_crop=0.0, jitter=0.0, erasing=0.0, erasing_fill="pixels",
        group="", test_groups=(), camera="", per_class=100, test_per_class=20, test_families=(), seed=0,
    ))
    config.model.update(dict(patch=0, width=0, depth=0, heads=0, head="new"))
    config.dcal.update(dict(cls_query=True, attach=0, pwca_head="shared", weighting="learned", bounds=(), rerank=False))
    config.loss.update(dict(triplet=((0.0, 1.0),), margin=0.3, identities=16))
    config.kd.update(dict(temperature=((0.0, 1.0),), kind="forward_kl", beta=0.5, alpha=0.1))
    config.teacher = ConfigDict(dict(
        path="", preset="tiny", patch=0, width=0, depth=0, heads=0, drop_path=0.0, dtype="float32", remat=False, mean=(), std=(),
        head="new", cache="",
    ))
    config.optimizer.update(dict(name="adamw", b2=0.999, weight_decay=0.05, decay="decoupled", clip=0.0))
    steps = EPOCHS * TRAINING_IMAGES[variant] // BATCH
    config.train.update(dict(
        steps=steps, batch=BATCH, lr=5e-4 / 512 * BATCH, warmup=0.05,  # the paper tells of no warm-up; DeiT has 5 epochs of it
        eval_every=steps // 20, checkpoint_every=500, log_every=50,
    ))
    config.runs = ("sa_only", "full")
    config.run = ConfigDict({mode: dict(recipe="dcal", dcal=dict(mode=mode)) for mode in ("sa_only", "sa_glca", "sa_pwca", "full")})
    return config
