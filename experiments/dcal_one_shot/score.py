"""python experiments/dcal_one_shot/score.py WORKDIR all_runs.zip: one-shot errors of the finished runs of WORKDIR, and of pixels.

The drawings (105 x 105, black on white) are brought to the 28 x 28 of training: inverted, then the mean over each pixel's area. The nearest
of the 20 by cosine is the answer; the features are what the branches that are used at inference classify, one after another.
"""

import io
import json
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxdistill.models import classifier

RUNS = 20


def read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """uint8 [28, 28, 1], bright ink."""
    drawing = Image.fromarray(255 - np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("L")))
    return np.asarray(drawing.resize((28, 28), Image.Resampling.BOX))[..., None]


def trials(path: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(items [20, 28, 28, 1], candidates [20, 28, 28, 1], which candidate each item is) of each official run."""
    found = []
    with zipfile.ZipFile(path) as archive:
        for run in range(1, RUNS + 1):
            pairs = [line.split() for line in archive.read(f"run{run:02d}/class_labels.txt").decode().splitlines() if line.strip()]
            candidates = sorted(name for _, name in pairs)
            found.append((np.stack([read(archive, item) for item, _ in pairs]), np.stack([read(archive, name) for name in candidates]),
                          np.asarray([candidates.index(name) for _, name in pairs])))
    return found


def error(embed, runs) -> tuple[float, float]:
    """Mean over the runs, and its standard error."""
    wrong = []
    for items, candidates, answer in runs:
        x, y = (embed(images) for images in (items, candidates))
        x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
        wrong.append(np.mean((x @ y.T).argmax(1) != answer))
    return float(np.mean(wrong)), float(np.std(wrong, ddof=1) / np.sqrt(len(wrong)))


def embedder(folder: Path):
    labels = json.loads((folder / "config.json").read_text())["id2label"]
    names = tuple(labels[str(i)] for i in range(len(labels)))
    model = classifier.describe(classifier.ModelConfig(path=str(folder), head="stored"), "model", image=(28, 28), channels=1, classes=names)
    params = model.load()

    @jax.jit
    def embed(images):
        outputs, features = model.module.apply({"params": params}, model.normalise(images))
        return jnp.concatenate([features[name] for name in outputs], axis=-1)

    return lambda images: np.asarray(embed(images))


def main() -> None:
    workdir, archive = sys.argv[1:]
    runs = trials(archive)
    rows = {"pixels": [error(lambda images: images.reshape(len(images), -1).astype(float), runs)]}
    for folder in sorted(Path(workdir).glob("runs/*/result.json")):
        rows.setdefault(folder.parent.name.rsplit("-", 1)[0], []).append(error(embedder(folder.parent / "export"), runs))
    for name, found in rows.items():
        each = (f"{100 * mean:.1f} % (standard error over the {RUNS} official runs {100 * deviation:.1f})" for mean, deviation in found)
        print(f"{name}: {', '.join(each)}")


if __name__ == "__main__":
    main()
