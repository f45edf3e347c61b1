"""Each feature term beside the logits, on the main job: does it help, and what does it cost?

    python -m jaxdistill.main --config=experiments/terms/ablation.py --workdir=workdir/terms

The job of configs/kd.py with five seeds. `logits`: kd alone. Every other run adds to it one term, strong at first and gone after 60 %
of the updates; `document` adds all four, with the weights and ramps of the document that started this project.
"""

from configs import kd

OFF = dict(weight=((0.0, 0.0),))
STRONG = {"hidden": 3.0, "attention": 1.0, "router": 0.5, "contrastive": 0.03}


def get_config():
    config, document = kd.get_config(), kd.get_config("document")
    config.seeds, config.headline = (0, 1, 2, 3, 4), "logits"
    for name in STRONG:
        config[name].update(OFF)
    run = {name: {name: dict(weight=((0.0, weight), (0.6, 0.0)))} for name, weight in STRONG.items()}
    run["document"] = {name: dict(weight=document[name].weight) for name in STRONG}
    run = {"logits": {}, **run}
    config.run = dict(teacher=config.run.teacher, ce_only=config.run.ce_only,
                      **{name: dict(recipe="student_aware", **change) for name, change in run.items()})
    config.runs = ("teacher", "ce_only", *run)
    return config
