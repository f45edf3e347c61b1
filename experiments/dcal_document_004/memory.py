"""Memory of a training process at each of its evaluations, on a folder of 1,000 images of which 20 are damaged.

    python experiments/dcal_document_004/memory.py

Writes the folder (letters, as PNG), trains on it by `python -m jaxdistill.main` with remat off and every branch on, and reads the resident
memory of that process from /proc (Linux) as each evaluation appears in metrics.jsonl.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from jaxdistill.data import glyphs

DAMAGED, CLASSES, EACH = 20, 25, 40


def write(folder: Path) -> None:
    drawn = glyphs.draw(classes=CLASSES, count=CLASSES * EACH, seed=3)
    for i, (image, label) in enumerate(zip(drawn.image, drawn.label, strict=True)):
        place = folder / f"{label:02d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i}.png")
    for path in sorted(folder.glob("*/*.png"))[:: CLASSES * EACH // DAMAGED]:
        path.write_bytes(path.read_bytes()[:200])


def resident(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "images")
        keys = dict(runs="('full',)", seeds="(0,)", **{
            "data.source": "folder", "data.path": f"{scratch}/images", "data.classes": 0, "data.test_families": "()",
            "data.corrupt": DAMAGED,
            "dcal.figures": 0, "train.steps": 500, "train.eval_every": 50, "train.checkpoint_every": 50})
        command = [sys.executable, "-m", "jaxdistill.main", "--config=configs/dcal.py", f"--workdir={scratch}/work"]
        process = subprocess.Popen([*command, *(f"--config.{key}={value}" for key, value in keys.items())],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        lines, seen = Path(scratch) / "work/runs/full-0/metrics.jsonl", 0
        while process.poll() is None:
            found = [json.loads(line) for line in lines.read_text().splitlines() if line.endswith("}")] if lines.exists() else []
            evaluations = [line for line in found if "evaluation" in line]
            for line in evaluations[seen:]:
                accuracy = line["evaluation"]["validation/accuracy"]
                print(f"update {line['step']:>4}: accuracy {accuracy:.3f}, resident {resident(process.pid):.0f} MiB", flush=True)
            seen = len(evaluations)
            time.sleep(0.1)
        warnings = [line for line in process.stderr.read().splitlines() if "cannot be read" in line]
        print(f"exit code {process.returncode}; {len(warnings)} images named as unreadable, as in: {warnings[0] if warnings else None}")


if __name__ == "__main__":
    main()
