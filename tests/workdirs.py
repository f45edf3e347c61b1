"""Workdirs as jobs leave them, written without training: for the commands that only read them."""

import json
import math
from pathlib import Path

from jaxdistill.training.results import paired

SPLITS = {"train": {"sha256": "a", "rows": 80}, "validation": {"sha256": "b", "rows": 10}, "test": {"sha256": "c", "rows": 10}}


def update(step: int, of: int, **more) -> dict:
    """A line of metrics.jsonl: two terms whose weights cross, two groups."""
    kd, lm = step / of, 1 - step / of
    raw = {"kd": 2.0 / step, "lm": 5.0 - 4.0 * step / of}
    terms = {name: {"raw": raw[name], "weight": weight, "weighted": weight * raw[name], "count": 8.0}
             for name, weight in (("kd", kd), ("lm", lm))}
    groups = {name: {"grad_norm": 0.1 + 1 / step, "param_norm": 2.0 + step / of, "update_ratio": 0.01 / step, "lr": lr, "changed": 1.0}
              for name, lr in (("student", 1e-3), ("router", 2e-3))}
    return {"step": step, "finite": True, "skipped": 0, "loss": kd * raw["kd"] + lm * raw["lm"], "gap": 0.0, "lr": 1e-3, "grad_norm": 0.5,
            "streak": 0, "clip": 1.0, "terms": terms, "knobs": {"temperature": 2.0}, "groups": groups, "probes": {}} | more


def run(
    workdir: Path, name: str, seed: int = 0, values: dict | None = None, *, lines=(), config=None, splits=None, best=None
) -> dict | None:
    """WORKDIR/runs/NAME-SEED. values: of the test split; None: it is not finished. lines: of metrics.jsonl. config: what it changes, by
    section. best: values at the best step, which is then the first half's last. Returns its row."""
    folder = workdir / "runs" / f"{name}-{seed}"
    folder.mkdir(parents=True)
    own = {"monitor": "validation/nll", "minimize": True, "seed": seed,
           "train": {"steps": 8, "batch": 4, "lr": 1e-3}, "data": {"length": 16}}
    for key, value in (config or {}).items():
        own[key] = own[key] | value if isinstance(value, dict) and key in own else value
    flat = {f"{key}.{k}": v for key, section in own.items() if isinstance(section, dict) for k, v in section.items()}
    manifest = {"command": ["main.py", "--config=a.py", f"--workdir={workdir}"], "packages": {"jax": "0.10.2", "grain": None}, "git": "abc",
                "device": {"kind": "cpu"}, "facts": {"splits": splits or SPLITS}, "groups": [], "parameters": []}
    row = None
    files = {"config": own, "manifest": manifest}
    if values is not None:
        steps = own["train"]["steps"]
        at_best = {"step": steps // 2, **best} if best else {"step": steps, **values}
        row = {"name": name, "seed": seed, **values, "best": at_best, "validation": {f"validation/{k}": v for k, v in values.items()},
               "steps": steps, "skipped": 0, "seconds": 1.5, "stop": "", "parameters": 1000}
        files["result"] = {"row": row, "identity": {"recipe": "lm", "config": flat | {"seed": seed}, "facts": {}}, "export": ""}
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return row


def job(workdir: Path, rows, headline: str = "kd", seeds=(0,), runs=("ce_only", "kd"), **more) -> Path:
    """The job's own files around its runs; rows of those that are finished."""
    rows = [row for row in rows if row]
    config = {"monitor": "validation/nll", "minimize": True, "headline": headline, "seeds": list(seeds), "runs": list(runs), "run": {}}
    (workdir / "config.json").write_text(json.dumps(config | more))
    if rows:
        results = {"metric": "nll", "minimize": True, "rows": rows, "paired": paired(rows, headline, "nll")}
        (workdir / "results.json").write_text(json.dumps(results))
    return workdir


def lines(steps: int = 8, **more) -> list[dict]:
    """Of a run of so many updates, with an evaluation at the half and at the end."""
    found = [update(step, steps, **more) for step in range(1, steps + 1)]
    for at in (steps, steps // 2):
        found.insert(at, {"step": at, "evaluation": {"validation/nll": 1 + math.exp(-at)}})
    return found
