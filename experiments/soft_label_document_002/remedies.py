"""Document 002, "Mode Collapse Fixes": what each of its remedies does, alone and all together, with inputs as they come and standardised.

    python experiments/soft_label_document_002/units.py workdir/units.npz
    python -m jaxdistill.main --config=experiments/soft_label_document_002/remedies.py --config.data.path=workdir/units.npz \\
        --workdir=workdir/remedies
    python -m jaxdistill.main --config=experiments/soft_label_document_002/remedies.py:graph --workdir=workdir/remedies_graph
    python experiments/table.py workdir/remedies accuracy kl ece15 entropy spread classes_predicted

An MLP on the addresses of configs/soft_label.py in the units of a register: `plain` is the default; rows of `raw` see the inputs as they
come (25,000 beside ratios), as the document's model did. Then what is better founded, each at a customary strength, and
`capped`: a bound on the logits with which no probability can be above 0.157, where the document's code ended. :graph is the transformer,
plain and with all of the document's remedies. Three seeds.
"""

from configs import soft_label

DOCUMENT = {  # its remedies, one by one, at its values; 4 (clipping at 1.0) is everyone's default: `no_clip` is without
    "smoothing": dict(smoothing=0.15),
    "temperature": dict(temperature=4.0, temperature_inference=4.0),
    "entropy": dict(entropy_weight=5.0, entropy_floor=1.5, entropy_kind="quadratic", guards=False),
    "final_decay": dict(final_decay=0.01),
    "class_weights": dict(class_weights="inverse"),
}
BEFORE = dict(temperature=2.0, temperature_inference=2.0, entropy_weight=2.0, entropy_floor=1.0, class_weights="inverse")
FOUNDED = {
    "own_floor": dict(entropy_weight=5.0, entropy_floor=1.2),  # below the 5th percentile of the targets' own entropy, 1.256
    "confidence": dict(confidence_weight=0.1), "max_suppression": dict(max_suppression=0.1),
    "margin": dict(margin_weight=0.1, margin=10.0), "logit_norm": dict(logit_norm=0.2), "mixup": dict(mixup=0.2),
}
CAPPED = dict(norm_cap=1.0, temperature=4.0, temperature_inference=4.0, guards=False)


def get_config(model: str = "mlp"):
    config = soft_label.get_config("seeds")
    config.soft.figures = False
    config.train.checkpoint_every = config.train.steps
    del config.model["mlp" if model == "graph" else "graph"]
    base = dict(config.run["graph" if model == "graph" else "mlp"])
    run = lambda clip=1.0, **soft: base | dict(soft=soft) | ({} if clip else dict(optimizer=dict(clip=0.0)))  # noqa: E731
    everything = soft_label.DOCUMENT_002
    if model == "graph":
        runs = dict(plain=base, document=run(**everything))
    else:
        config.data = dict(source="table", path="", test=0.2, validation=0.1)
        runs = dict(plain=base, no_clip=run(clip=0.0), **{name: run(**soft) for name, soft in DOCUMENT.items()},
                    before=run(**BEFORE), document=run(**everything))  # fmt: skip
        runs |= dict(raw=run(standardise=False), raw_no_clip=run(clip=0.0, standardise=False),
                     raw_before=run(clip=0.0, standardise=False, **BEFORE), raw_document=run(standardise=False, **everything))  # fmt: skip
        runs |= {name: run(**soft) for name, soft in FOUNDED.items()} | dict(capped=run(**CAPPED))
    config.run = {name: dict(config.run[name]) for name in ("constant", "softmax")} | runs
    config.runs, config.headline = ("constant", "softmax", *runs), "plain"
    return config
