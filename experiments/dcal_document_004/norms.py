"""python experiments/dcal_document_004/norms.py WORKDIR PICTURE.png: norm of the decayed weights, a learned loss weight, accuracy."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RUNS = {"decoupled": "tab:blue", "coupled": "tab:red"}


def main() -> None:
    workdir, picture = sys.argv[1:]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for name, colour in RUNS.items():
        for folder in sorted(Path(workdir).glob(f"runs/{name}-[0-9]*")):
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            steps = [line for line in lines if "groups" in line]
            measured = [line for line in lines if "evaluation" in line]
            at, style = [line["step"] for line in steps], dict(color=colour, lw=1.5, label=name if folder.name.endswith("-0") else None)
            axes[0].plot(at, [line["groups"]["student"]["param_norm"] for line in steps], **style)
            looked = [line for line in steps if "w_sa" in line["probes"]]
            axes[1].plot([line["step"] for line in looked], [line["probes"]["w_sa"] for line in looked], **style)
            axes[2].plot([line["step"] for line in measured], [line["evaluation"]["validation/accuracy"] for line in measured], **style)
    rate = steps[-1]["groups"]["balance"]["lr"]
    axes[1].plot(at, [rate * step for step in at], color="grey", ls=":", label="learning rate x updates")
    for axis, title in zip(axes, ("norm of the decayed weights", "learned loss weight of SA", "validation accuracy"), strict=True):
        axis.set(title=title, xlabel="updates", ylim=(0, None))
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
