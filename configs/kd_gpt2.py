"""GPT-2 medium -> a student of DistilGPT-2's size, from local Hugging Face folders, on your own text.

    python -m jaxdistill.main --config=configs/kd_gpt2.py --workdir=workdir/gpt2 \
        --config.teacher.path=DIR/gpt2-medium --config.student.path=DIR/distilgpt2 --config.data.path=DIR/text

Each folder holds config.json, model.safetensors and tokenizer.json, as on the hub; where there is a network, the names there will
do too (gpt2-medium, distilgpt2). Text: a folder of .txt files (or --config.data.source=jsonl | parquet | tfds). For one GPU of 40
GiB or more, or a TPU slice; --dry_run prints the memory and FLOPs that it predicts. Several devices:
--config.mesh='(-1, 4, 1)' cuts parameters and moments into four.
Not measured here: no weights of that size were at hand.
"""

from ml_collections import ConfigDict

from jaxdistill.training.defaults import defaults


def get_config():
    config = defaults()
    config.headline = "kd"
    family = dict(family="gpt2", kv_heads=0)  # of a fresh model, as the sizes: a folder says its own
    config.teacher = ConfigDict(dict(path="", width=1024, depth=24, heads=16, dtype="bfloat16", remat=False, cache="", **family))
    config.student = ConfigDict(dict(path="", width=768, depth=6, heads=12, dtype="bfloat16", remat=True, **family))
    config.data = ConfigDict(dict(
        source="files", path="", field="text", invalid_utf8="error",
        tokenizer=config.teacher.get_oneway_ref("path"),  # the models' own
        vocab=50257, length=1024, validation=0.01, test=0.01, train_tokens=0, eval_tokens=1_048_576,
        train_path="",
    ))
    config.lm = ConfigDict(dict(smoothing=0.0))
    # What each option does: configs/kd.py. The feature terms are off here until measured.
    config.kd = ConfigDict(dict(
        weight=((0.0, 0.9),), temperature=((0.0, 1.0),), mode="logits", kind="forward_kl", beta=0.5, alpha=0.1, top_k=64, tau=100.0,
    ))
    config.on_policy = ConfigDict(dict(fraction=((0.0, 0.0),), prompt=32, temperature=1.0, top_p=1.0))  # rows have room for more
    config.hidden = ConfigDict(dict(weight=((0.0, 0.0),), distance="rms", projector="linear", balance=0.01))
    config.attention = ConfigDict(dict(weight=((0.0, 0.0),)))
    config.contrastive = ConfigDict(dict(weight=((0.0, 0.0),), temperature=0.07))
    config.router = ConfigDict(dict(weight=((0.0, 0.0),), k=((0.0, 1.0), (1.0, 4.0)), temperature=((0.0, 1.0), (1.0, 0.1)),
                                    balance=0.01, lr_mult=2.0))
    config.projector = ConfigDict(dict(kind="linear", init="lstsq", weight=1.0, lr_mult=5.0, ridge=1e-3, calibration=8, gate=True))
    config.react = ConfigDict(dict(patience=0, balance=""))
    config.train.update(dict(
        steps=20_000, batch=64, micro=4, lr=5e-5, warmup=0.02, final_lr=0.1, eval_every=1000, checkpoint_every=500, log_every=10,
    ))
    off = {term: dict(weight=((0.0, 0.0),)) for term in ("kd", "hidden", "attention", "contrastive", "router")}
    config.runs = ("teacher", "untouched", "ce_only", "kd", "ce_only_same_seconds")
    config.run = ConfigDict(dict(
        teacher=dict(recipe="lm", once=True, train=dict(steps=0), model=dict(
            path=config.teacher.get_ref("path"), width=1024, depth=24, heads=16, dtype="bfloat16", remat=False, **family)),
        untouched=dict(recipe="student_aware", train=dict(steps=0), **off),
        ce_only=dict(recipe="student_aware", **off),
        kd=dict(recipe="student_aware"),
        ce_only_same_seconds=dict(recipe="student_aware", seconds_of="kd", pace_of="ce_only", **off),
    ))
    return config
