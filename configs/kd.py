"""The main job: a small language model distilled from a larger one, from nothing but this machine.

    python -m jaxdistill.main --config=configs/kd.py --workdir=workdir/kd          (or: make kd)

Text: the Python standard library. A 3 x 160 GPT-2 is pre-trained on the whole training split (400 updates, which read
a quarter of it), and kept for later jobs; then a 2 x 96 student that may see only 60,000 tokens learns from it, beside
the same student without a teacher, for the same updates and for the same seconds. 4 minutes on two idle CPU cores;
1.981 bits/byte on the test text, against 2.427 and 2.408 without a teacher (means of three seeds; experiments/kd).

Variants, after a colon:
    :smoke      a minute in all: everything runs, nothing is learned well
    :seeds      three seeds, with paired intervals
    :document   every term, on the schedules of the document that started this project
    :cross      the teacher has another tokenizer too (4,096 ids; the student 1,024): three ways to learn from it
"""

from ml_collections import ConfigDict, FieldReference

from jaxdistill.training.defaults import defaults

VARIANTS = ("", "smoke", "seeds", "document", "cross")


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
        train_path="",           # a file of jaxdistill.generate: the student trains on it, in place of the training split
    ))
    family = dict(family="gpt2", kv_heads=0)  # gpt2 | llama, with fewer heads of keys and values than kv_heads 0
    config.student = ConfigDict(dict(path="", width=96, depth=2, heads=4, dtype="float32", remat=False, **family))
    model = dict(width=160, depth=3, heads=4, dtype="float32", remat=False, **family)
    config.teacher = ConfigDict(dict(
        path=FieldReference("", field_type=object),   # "": the one trained here; a folder, a name on the hub, or a tuple of several
        cache=FieldReference("", field_type=object),  # of python -m jaxdistill.cache, read in its place; or a tuple, of several
        **model,
    ))
    config.lm = ConfigDict(dict(smoothing=0.0))
    # Weights and knobs are ramps: ((fraction of the updates, value), ...). A term whose weight is always 0 is left out.
    config.kd = ConfigDict(dict(
        weight=((0.0, 0.9),),    # the weight of lm is 1 - this
        temperature=((0.0, 1.0),),
        mode="logits",           # logits | projector | alm | uld (all but the first also for a teacher of another tokenizer)
        kind="forward_kl",       # forward_kl | reverse_kl | jsd | skew_kl | skew_reverse_kl | total_variation | topk_kl
        beta=0.5, alpha=0.1, top_k=64,  # of jsd, of the skew ones, of topk_kl
        tau=100.0,               # of alm
        teacher_weights=(),      # of several teachers; (): equal ones
        mixture="probabilities", # probabilities | logits: of what the mean is taken
    ))
    config.on_policy = ConfigDict(dict(  # GKD; needs kd.mode logits
        fraction=((0.0, 0.0),),  # of the updates, those whose batch the student writes itself (lambda)
        prompt=32,               # tokens of each row that are kept, and continued
        temperature=1.0, top_p=1.0,  # of the sampling
    ))
    # Of the feature terms, only `hidden` pays here, strong at first and gone before the end (experiments/terms).
    config.hidden = ConfigDict(dict(weight=((0.0, 3.0), (0.6, 0.0)), distance="rms", projector="linear", balance=0.01))
    config.attention = ConfigDict(dict(weight=((0.0, 0.0),)))
    config.contrastive = ConfigDict(dict(weight=((0.0, 0.0),), temperature=0.07))
    config.router = ConfigDict(dict(weight=((0.0, 0.0),), k=((0.0, 1.0), (1.0, 4.0)), temperature=((0.0, 1.0), (1.0, 0.1)),
                                    balance=0.01, lr_mult=2.0))
    config.projector = ConfigDict(dict(  # of kd.mode projector: teacher's states -> student's space
        kind="linear",           # linear | mlp
        init="lstsq",            # lstsq | heads | orthogonal | normal | kaiming_uniform
        weight=1.0,              # of its anchor
        lr_mult=5.0, ridge=1e-3, calibration=8,
        gate=True,               # kd opens when the projected teacher predicts better than token frequencies
    ))
    config.react = ConfigDict(dict(patience=0, balance=""))  # early stopping; the term to whose size feature terms are brought
    config.train.lr = 3e-3
    config.train.steps = 200

    off = {term: dict(weight=((0.0, 0.0),)) for term in ("kd", "hidden", "attention", "contrastive", "router")}
    # The runs, in order. What a run does not name is as above.
    config.runs = ("teacher", "untouched", "ce_only", "kd", "ce_only_same_seconds")
    config.run = ConfigDict(dict(
        teacher=dict(recipe="lm", once=True, cached=True, fills="teacher.path", given="model.path",
                     model=dict(path="", **model), data=dict(train_tokens=0, train_path=""), train=dict(steps=400, eval_every=100)),
        untouched=dict(recipe="student_aware", train=dict(steps=0), **off),
        ce_only=dict(recipe="student_aware", **off),
        kd=dict(recipe="student_aware"),
        ce_only_same_seconds=dict(recipe="student_aware", seconds_of="kd", pace_of="ce_only", **off),
    ))

    if variant == "seeds":
        config.seeds = (0, 1, 2)
    if variant == "document":
        config.kd.weight = ((0.0, 0.1), (0.2, 0.7))
        config.kd.temperature = ((0.0, 2.0), (1.0, 1.5))
        config.attention.weight = ((0.1, 0.0), (0.4, 0.1))
        config.router.weight = ((0.1, 0.0), (0.4, 0.1))
        config.hidden.weight = ((0.4, 0.0), (0.7, 0.05))
        config.contrastive.weight = ((0.7, 0.0), (1.0, 0.05))
    if variant == "cross":
        config.data.vocab, config.run.teacher.data.vocab = 1024, 4096
        config.hidden.weight = ((0.0, 0.0),)  # nothing beside alm (experiments/cross)
        config.kd.mode = config.headline = config.run.ce_only_same_seconds.seconds_of = "alm"
        del config.run.kd
        config.run.alm = dict(recipe="student_aware")
        # Its target is read through the student's own head, which learns from lm alone: hence less of it, and later.
        config.run.projector = dict(recipe="student_aware", kd=dict(mode="projector", weight=((0.3, 0.0), (0.6, 0.5))))
        config.run.uld = dict(recipe="student_aware", kd=dict(mode="uld"))
        config.runs = ("teacher", "untouched", "ce_only", "alm", "ce_only_same_seconds", "projector", "uld")
    if variant == "smoke":
        config.data.eval_tokens = 8_192
        config.train.steps = 30
        config.train.eval_every = config.train.checkpoint_every = 15
        config.run.teacher.train.steps = 30
    return config
