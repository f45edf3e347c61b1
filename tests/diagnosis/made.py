"""Records of runs that never ran: healthy ones, into which tests put one fault at a time."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow

from jaxdistill.diagnosis import records
from jaxdistill.diagnosis.finding import Finding

VOCABULARY = 2048


def number(value: float):
    return value if math.isfinite(value) else str(value)


def nested(flat: dict) -> dict:
    """{'terms/lm/raw': 1.0} -> {'terms': {'lm': {'raw': 1.0}}}; of a probe, all that follows is its name."""
    tree: dict = {}
    for path, value in flat.items():
        names = path.split("/", 1) if path.startswith("probes/") else path.split("/")
        node = tree
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = value
    return tree


@dataclasses.dataclass
class Made:
    """columns: path -> [updates]; of probes, what is nan is not written. evaluations, deep: by update."""

    columns: dict
    config: dict
    manifest: dict
    evaluations: dict = dataclasses.field(default_factory=dict)
    deep: dict = dataclasses.field(default_factory=dict)
    findings: dict = dataclasses.field(default_factory=dict)
    row: dict | None = None
    rows: list = dataclasses.field(default_factory=list)

    @property
    def steps(self) -> np.ndarray:
        return self.columns["step"]

    @property
    def rising(self) -> np.ndarray:
        """0 to 1 over the updates."""
        return np.linspace(0, 1, len(self.steps))

    def term(self, name: str, raw, weight=1.0, count=2000.0, factor=1.0) -> "Made":
        """A term, which also enters the loss."""
        raw, weight, count = (np.broadcast_to(np.asarray(x, float), self.steps.shape) for x in (raw, weight, count))
        old = self.columns.get(f"terms/{name}/weighted", 0.0)
        new = {"raw": raw, "weight": weight, "weighted": factor * weight * raw, "count": count}
        self.columns |= {f"terms/{name}/{field}": value for field, value in new.items()}
        self.columns["loss"] = self.columns["loss"] - old + new["weighted"]
        return self

    def put(self, path: str, values) -> "Made":
        self.columns[path] = np.broadcast_to(np.asarray(values, float), self.steps.shape).copy()
        return self

    def probe(self, name: str, values, every: int = 10) -> "Made":
        values = np.broadcast_to(np.asarray(values, float), self.steps.shape)
        return self.put(f"probes/{name}", np.where((self.steps == 1) | (self.steps % every == 0), values, np.nan))

    def measure(self, metric: str, values, every: int = 50) -> "Made":
        values = np.broadcast_to(np.asarray(values, float), self.steps.shape)
        for step, value in zip(self.steps, values, strict=True):
            if step % every == 0:
                self.evaluations.setdefault(int(step), {})[metric] = float(value)
        return self

    def look(self, every: int = 50, **line) -> "Made":
        """A deep line."""
        for step in self.steps[self.steps % every == 0]:
            self.deep[int(step)] = self.deep.get(int(step), {}) | line
        return self

    def text(self) -> bytes:
        lines = []
        for index, step in enumerate(self.steps):
            here = {path: values[index] for path, values in self.columns.items()}
            flat = {path: number(float(value)) for path, value in here.items() if not (path.startswith("probes/") and np.isnan(value))}
            line = {"probes": {}, "knobs": {}} | nested(flat) | {"step": int(step), "finite": bool(here["finite"])}
            said = {"findings": [one._asdict() for one in self.findings[step]]} if step in self.findings else {}
            lines.append(line | said)
            for kind, found in (("evaluation", self.evaluations), ("deep", self.deep)):
                if step in found:
                    plain = {name: number(value) if isinstance(value, float) else value for name, value in found[step].items()}
                    lines.append({"step": int(step), kind: plain})
        return "".join(json.dumps(line) + "\n" for line in lines).encode()

    def run(self, name: str = "kd-0") -> records.Run:
        """As `records.parse` of the text has it."""
        columns = records.Columns({path: pyarrow.array(values) for path, values in self.columns.items()}, len(self.steps), {})
        said = [(step, finding) for step, several in self.findings.items() for finding in several]
        log = records.Log(columns, sorted(self.evaluations.items()), sorted(self.deep.items()), said, 0)
        return records.Run(name, self.config, self.manifest, self.row, log)

    def job(self) -> records.Job:
        results = {"metric": "bits_per_byte", "minimize": True, "rows": self.rows}
        return records.Job(Path("workdir"), {"run": {}} | self.config, results, {"kd-0": self.run()})


def blank(steps: int = 200, *, classes: int = VOCABULARY, **config) -> Made:
    """A run without terms whose parameters move as they should: two groups, the first of which decays."""
    at = np.arange(1, steps + 1)
    along = np.linspace(0, 1, steps)
    lr = 3e-3 * np.minimum(at / 10, 1) * (0.5 + 0.5 * np.cos(np.pi * along)) + 1e-6
    made = Made(
        columns={"step": at, "finite": np.ones(steps), "skipped": np.zeros(steps), "loss": np.zeros(steps), "gap": np.zeros(steps),
                 "lr": lr, "grad_norm": np.full(steps, 0.8), "streak": np.zeros(steps), "clip": np.ones(steps)},
        config={"monitor": "validation/bits_per_byte", "minimize": True, "gates": {"non_finite": 5, "ledger_gap": 1e-4},
                "train": {"steps": steps, "batch": 16, "lr": 3e-3, "ema": 0.0}, "data": {"length": 128}, "lm": {"smoothing": 0.0},
                "optimizer": {"name": "adamw", "decay": "decoupled", "weight_decay": 0.01}, "model": {"dtype": "float32"}} | config,
        manifest={
            "groups": [
                {"group": name, "lr_mult": 1.0, "weight_decay": decay, "frozen": False, "leaves": 9, "parameters": size}
                for name, decay, size in (("student", 0.01, 400_000), ("student_no_decay", 0.0, 4_000))
            ],
            "preflight": {"steps": steps, "batch": 16, "classes": classes, "uniform_nll": math.log(classes), "train_rows": 5000,
                          "splits": {}, "leaks": [], "unseen_classes": [], "reachable": None, "no_term": [],
                          "input": {"abs_max": 3.0, "mean_abs": 0.7, "std_max": 1.0}, "teacher": None},
        },
    )  # fmt: skip
    for name, norm in (("student", 20.0), ("student_no_decay", 8.0)):
        fields = {"grad_norm": 0.5, "param_norm": norm * (1 + 0.5 * along), "update_ratio": 2 * lr, "lr": lr, "changed": 1.0}
        for field, values in fields.items():
            made.put(f"groups/{name}/{field}", values)
    return made


def falling(made: Made, start: float, end: float, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    """A loss that falls as losses do, with the noise of batches."""
    curve = end + (start - end) * np.exp(-5 * made.rising)
    return curve * (1 + noise * np.random.default_rng(seed).normal(size=len(made.steps)))


def language(steps: int = 200) -> Made:
    """A student of the same vocabulary that learns from its teacher, in two thirds of an epoch."""
    made = blank(steps)
    made.config["kd"] = {"weight": [[0.0, 0.9]], "mode": "logits", "temperature": [[0.0, 1.0]]}
    lm, kd = falling(made, 7.6, 3.4), falling(made, 5.0, 0.5, seed=1)
    made.term("lm", lm, 0.1).term("kd", kd, 0.9)
    noisy = lambda value, seed: value * (1 + 0.02 * np.random.default_rng(seed).normal(size=steps))  # noqa: E731
    made.probe("valid", 0.975).probe("entropy", falling(made, 7.5, 3.2, seed=2)).probe("spread", 7.0 - falling(made, 6.9, 2.8, seed=3))
    made.probe("teacher_entropy", noisy(2.6, 4)).probe("teacher_nll", noisy(2.7, 5)).probe("teacher_kl", kd)
    nll = falling(made, 7.6, 3.5, 0.0)
    made.measure("validation/nll", nll).measure("validation/perplexity", np.exp(nll))
    made.measure("validation/teacher_kl", falling(made, 5.0, 0.55, 0.0)).measure("validation/bits_per_byte", falling(made, 3.7, 1.9, 0.0))
    made.look(batch_of_one=1e-6, ema_distance=None, ema_initial=None, zero_gradient=[],
              terms={"lm": {"grad_norm": 0.1, "share": 0.1}, "kd": {"grad_norm": 0.9, "share": 0.9}}, cosines={"kd|lm": 0.8})
    made.row = {"name": "kd", "seed": 0, "bits_per_byte": 1.95, "nll": 3.6, "steps": steps, "best": {"step": steps, "bits_per_byte": 1.95}}
    made.rows = [
        {"name": "teacher", "seed": 0, "bits_per_byte": 1.5, "nll": 2.75, "steps": 400, "best": {"step": 400, "bits_per_byte": 1.5}},
        {"name": "untouched", "seed": 0, "bits_per_byte": 3.75, "nll": 7.62, "steps": 0, "best": {"step": 0, "bits_per_byte": 3.75}},
        {"name": "ce_only", "seed": 0, "bits_per_byte": 2.4, "nll": 4.4, "steps": steps, "best": {"step": 150, "bits_per_byte": 2.35}},
        made.row,
    ]
    return made


def classifier(steps: int = 200, classes: int = 50) -> Made:
    """A classifier that learns: sure, right, and different for each example."""
    made = blank(steps, classes=classes, monitor="validation/nll", loss={"smoothing": 0.0}, data={})
    cost = falling(made, math.log(classes), 0.4)
    made.term("loss", cost, count=32.0)
    made.probe("entropy", falling(made, math.log(classes), 0.4, seed=2)).probe("correct", 0.9 * made.rising).probe("logit_abs_max", 9.0)
    made.probe("spread", 3.4 * (1 - np.exp(-5 * made.rising))).probe("logit_std", 0.1 + 3 * made.rising).probe("classes_predicted", 0.5)
    made.measure("validation/nll", falling(made, math.log(classes), 0.7, 0.0)).measure("validation/accuracy", 0.8 * made.rising)
    made.look(batch_of_one=1e-7, zero_gradient=[])
    made.row = {"name": "kd", "seed": 0, "nll": 0.8, "accuracy": 0.75, "steps": steps, "best": {"step": steps, "nll": 0.8}}
    made.rows = [made.row]
    return made


def gate(name: str) -> Finding:
    """As a gate writes it."""
    return Finding(name, "error", "update 10: 2 parameters", "why", "what to do")
