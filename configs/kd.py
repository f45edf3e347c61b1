"""The main job: a small language model distilled from a larger one, from nothing but this machine.

    python -m jaxdistill.main --config=configs/kd.py --workdir=workdir/kd          (or: make kd)

Text: the Python standard library. A 3 x 160 GPT-2 is pre-trained on all of its training split (and kept for later
jobs); then a 2 x 96 student that may see only 60,000 tokens learns from it, beside the same student without a
teacher, for the same updates and for the same seconds.

Variants, after a colon:
    :smoke      a minute in all: everything runs, nothing is learned well
    :seeds      three seeds, with paired intervals
    :document   the schedules of the document that started this project (T 2.0 -> 1.5, weight 0.1 -> 0.7)
"""

from ml_collections import ConfigDict

from jaxdistill.training.defaults import defaults

VARIANTS = ("", "smoke", "seeds", "document")


def get_config(variant: str = ""):
    if variant not in VARIANTS:
        raise ValueError(f"configs/kd.py: found variant {variant!r}; accepted: {', '.join(VARIANTS[1:])}")
    config = defaults()
    config.headline = "kd"

    config.data = ConfigDict(dict(
        source="stdlib",         # stdlib | files | jsonl | parquet | tfds
        path="",                 # of files, jsonl, parquet; the name of a TFDS data set
        field="text",            # of jsonl, parquet, tfds
        invalid_utf8="error",    # error | replace (and count)
        tokenizer="",            # "": a byte-level BPE trained on the training split; or a folder, or a hub name
        vocab=2048,              # of the BPE that is trained
        length=128,              # tokens a row
        validation=0.05,         # share of the documents
        test=0.05,
        train_tokens=60_000,     # what the student may train on; 0: everything
        eval_tokens=16_384,      # of validation and of test; 0: everything
    ))
    config.student = ConfigDict(dict(path="", width=96, depth=2, heads=4, dtype="float32", remat=False))
    config.teacher = ConfigDict(dict(path="", width=160, depth=3, heads=4, dtype="float32", remat=False))
    config.lm = ConfigDict(dict(smoothing=0.0))
    config.kd = ConfigDict(dict(
        weight=((0.0, 0.9),),       # ((fraction of the updates, weight), ...); the weight of lm is 1 - this
        temperature=((0.0, 1.0),),
    ))
    config.train.lr = 3e-3
    config.train.steps = 200

    # The runs, in order. What a run does not name is as above.
    config.runs = ("teacher", "untouched", "ce_only", "kd", "ce_only_same_seconds")
    config.run = ConfigDict(dict(
        teacher=dict(recipe="lm", once=True, cached=True, fills="teacher.path", given="model.path",
                     model=dict(config.teacher), data=dict(train_tokens=0), train=dict(steps=400, eval_every=100)),
        untouched=dict(recipe="student_aware", train=dict(steps=0)),
        ce_only=dict(recipe="student_aware", kd=dict(weight=((0.0, 0.0),))),
        kd=dict(recipe="student_aware"),
        ce_only_same_seconds=dict(recipe="student_aware", kd=dict(weight=((0.0, 0.0),)),
                                  seconds_of="kd", pace_of="ce_only"),
    ))

    if variant == "seeds":
        config.seeds = (0, 1, 2)
    if variant == "document":
        config.kd.weight = ((0.0, 0.1), (0.2, 0.7))
        config.kd.temperature = ((0.0, 2.0), (1.0, 1.5))
    if variant == "smoke":
        config.data.eval_tokens = 8_192
        config.train.steps = 30
        config.train.eval_every = config.train.checkpoint_every = 15
        config.run.teacher.train.steps = 30
    return config
