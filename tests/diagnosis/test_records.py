"""The reader: every number where it was written, from files of any state, fast, and without JAX."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.diagnosis import records
from jaxdistill.diagnosis.finding import Finding

FINDING = Finding("non_finite", "warning", "update 2", "cause", "cure")


def update(step: int, loss: float = 1.0, **more) -> dict:
    return {"step": step, "finite": True, "skipped": 0, "loss": loss, "gap": 0.0, "lr": 1e-3, "grad_norm": 0.5,
            "terms": {"kd": {"raw": loss, "weight": 1.0, "weighted": loss, "count": 4.0}}, "knobs": {},
            "groups": {"student": {"grad_norm": 0.5, "param_norm": 2.0, "update_ratio": 0.01, "lr": 1e-3, "changed": 1.0}},
            "probes": {}} | more  # fmt: skip


def text(lines: list[dict]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


LINES = [
    update(1, probes={"router/load_0": 0.5}),
    update(2, "nan", finite=False, findings=[FINDING._asdict()]),
    update(3, 3.0),
    {"step": 3, "evaluation": {"validation/nll": 2.0}},
    {"step": 3, "deep": {"cosines": {"a|b": 0.5}, "zero_gradient": ["x/kernel"], "batch_of_one": None}},
    update(4, 4.0, probes={"router/load_0": 0.25}),
    {"step": 4, "evaluation": {"validation/nll": "inf", "validation/kl": 1.0}},
]


def run(lines: list[dict], **more) -> records.Run:
    return records.Run("kd-0", more.get("config", {}), more.get("manifest", {}), more.get("row"), records.parse(text(lines)))


def test_every_number_is_where_it_was_written():
    found = run(LINES)
    np.testing.assert_array_equal(found.steps, [1, 2, 3, 4])
    np.testing.assert_array_equal(found.updates["loss"], [1.0, np.nan, 3.0, 4.0])
    np.testing.assert_array_equal(found.updates["finite"], [1, 0, 1, 1])
    np.testing.assert_array_equal(found.term("kd", "weight"), np.ones(4))
    np.testing.assert_array_equal(found.group("student", "changed"), np.ones(4))
    assert (found.terms, found.groups, found.probes, found.knobs) == (["kd"], ["student"], ["router/load_0"], [])
    steps, values = found.probe("router/load_0")
    assert (list(steps), list(values)) == ([1, 4], [0.5, 0.25])
    assert [list(x) for x in found.evaluation("validation/nll")] == [[3, 4], [2.0, math.inf]]
    assert [list(x) for x in found.evaluation("validation/kl")] == [[4], [1.0]]
    assert found.log.deep == [(3, {"cosines": {"a|b": 0.5}, "zero_gradient": ["x/kernel"]})]
    assert found.log.findings == [(2, FINDING)]
    assert found.log.broken == 0


def test_a_column_that_no_line_has_is_empty():
    assert np.isnan(run(LINES).updates["terms/lm/raw"]).all()
    assert len(run(LINES).probe("spread")) == 0
    assert len(run([]).updates["loss"]) == 0


@pytest.mark.parametrize("seed", range(3))
def test_plain_and_strange_lines_mix_in_any_order(seed):
    """Read in one piece or line by line, the columns are what Python's own reader gives."""
    rng = np.random.default_rng(seed)
    values = [value if rng.random() < 0.7 else str(rng.choice(["nan", "inf", "-inf"])) for value in rng.normal(size=60)]
    lines = []
    for step, value in enumerate(values, 1):
        lines.append(update(step, value, probes={"a": step} if step % 3 == 0 else {}))
        if step % 7 == 0:
            lines.append({"step": step, "evaluation": {"validation/nll": values[step - 1]} if step % 2 else {}})
    found = run(lines)
    np.testing.assert_array_equal(found.updates["loss"], np.asarray(values, float))
    np.testing.assert_array_equal(found.probe("a").steps, np.arange(3, 61, 3))
    np.testing.assert_array_equal(found.evaluation("validation/nll").values, [float(values[step - 1]) for step in range(7, 61, 14)])


def test_a_line_that_a_crash_cut_is_left_out():
    log = records.parse(text([update(1), update(2)])[:-9])
    np.testing.assert_array_equal(log.updates["loss"], [1.0])
    assert log.broken == 1


def test_a_broken_line_in_the_middle_loses_no_other():
    lines = text([update(1)]) + b'{"step": 2, "loss": 1.\x00\n[]\n\n' + text([update(3, 3.0)])
    log = records.parse(lines)
    np.testing.assert_array_equal(log.updates["loss"], [1.0, 3.0])
    assert log.broken == 2


def test_later_lines_may_have_more():
    found = run([update(1), update(2, probes={"entropy": 1.0})] + [update(step, streak=1) for step in range(3, 9)])
    np.testing.assert_array_equal(found.updates["streak"], [np.nan] * 2 + [1.0] * 6)
    assert found.probe("entropy").values == [1.0]


def test_it_is_fast():
    """20,000 lines of 40 numbers in 0.4 s of processor time, as 100,000 in 2 s."""
    wide = {f"probe_{i}": 0.123456789 * i for i in range(25)}
    one = json.dumps(update(1, 0.5, probes=wide)) + "\n"
    assert one.count(": ") - one.count("{") + 1 >= 40
    lines = (one * 20_000).encode()
    records.parse(lines[: len(one)])  # imports
    taken = []
    for _ in range(3):
        since = time.process_time()
        log = records.parse(lines)
        columns = [log.updates[path] for path in log.updates]
        taken.append(time.process_time() - since)
    assert {len(column) for column in columns} == {20_000}
    assert min(taken) < 0.4


def test_it_needs_no_jax():
    code = "import sys; from jaxdistill.diagnosis import records; records.parse(b'{}\\n'); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


@pytest.fixture
def workdir(tmp_path):
    """A finished teacher, and a kd that runs."""
    job = {"seeds": [0], "runs": ["teacher", "kd"], "run": {"kd": {"train": {"lr": 0.1}}}, "train": {"lr": 0.2, "steps": 4}}
    (tmp_path / "config.json").write_text(json.dumps(job))
    (tmp_path / "results.json").write_text(json.dumps({"metric": "nll", "minimize": True, "rows": [{"name": "teacher", "seed": 0}]}))
    for name in ("kd-0", "teacher-0", ".kd-0.123"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"train": {"lr": 0.1, "steps": 4}}))
        (folder / "metrics.jsonl").write_bytes(text(LINES))
    (tmp_path / "runs/teacher-0/result.json").write_text(json.dumps({"row": {"name": "teacher", "seed": 0, "nll": 1.0}}))
    return tmp_path


def test_a_job_in_any_state(workdir):
    job = records.read(workdir)
    assert list(job.runs) == ["teacher-0", "kd-0"]
    assert job.runs["teacher-0"].row["nll"] == 1.0
    kd = job.runs["kd-0"]
    assert (kd.name, kd.seed, kd.row, kd.manifest, kd.preflight) == ("kd", 0, None, {}, {})
    assert (kd.get("train.lr"), kd.get("train.nothing"), kd.get("a.b", 3)) == (0.1, None, 3)
    assert job.flag(kd, "train.lr", 1e-3) == "--config.run.kd.train.lr=0.001"
    assert job.flag(kd, "optimizer.decay", "decoupled") == "--config.optimizer.decay=decoupled"
    assert job.flag(job.runs["teacher-0"], "train.lr", 1e-3) == "--config.train.lr=0.001"
    (workdir / "results.json").unlink()
    assert list(records.read(workdir).runs) == ["teacher-0", "kd-0"]
    assert records.read(workdir).rows == []


def test_a_row_that_is_not_finite_is_of_numbers(workdir):
    """Also its nested parts, and what results.json holds of it."""
    row = {"name": "teacher", "seed": 0, "nll": "inf", "best": {"step": 1, "nll": "nan"}, "stop": ""}
    (workdir / "runs/teacher-0/result.json").write_text(json.dumps({"row": row}))
    (workdir / "results.json").write_text(json.dumps({"rows": [row], "paired": [{"mean": "nan", "interval": ["-inf", "inf"]}]}))
    job = records.read(workdir)
    for found in (job.rows[0], job.runs["teacher-0"].row):
        assert found == row | {"nll": math.inf, "best": found["best"]}
        assert math.isnan(found["best"]["nll"])
    assert job.results["paired"][0]["interval"] == [-math.inf, math.inf]


@pytest.mark.parametrize(("path", "content", "said"), [
    ("config.json", None, r"config\.json: No such file.*accepted: the workdir of a job"),
    ("config.json", "{", r"config\.json: cannot be read as JSON .*accepted"),
    ("results.json", "[]", r"results\.json: found a JSON list; accepted"),
    ("runs/kd-0/config.json", "3", r"kd-0/config\.json: found a JSON int; accepted"),
])
def test_a_bad_workdir(path, content, said, workdir):
    (workdir / path).unlink()
    if content is not None:
        (workdir / path).write_text(content)
    with pytest.raises(UserError, match=said):
        records.read(workdir)


def test_no_workdir(tmp_path):
    with pytest.raises(UserError, match="no such folder; accepted: the workdir of a job"):
        records.read(tmp_path / "nothing")
