"""The command: what a newcomer reads, what a machine reads, and its exit code, on jobs in any state."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxdistill import UserError, diagnosis, doctor
from tests.diagnosis.made import Made, classifier
from tests.diagnosis.test_rules import not_stepping, overfits_at_the_end

ROOT = Path(__file__).parents[2]


def write(workdir: Path, made: Made, *, cut: int = 0) -> Path:
    """A job of one run, as training leaves it. cut: bytes that its last line lacks."""
    folder = workdir / "runs/kd-0"
    folder.mkdir(parents=True)
    job = {"seeds": [0], "runs": ["kd"], "run": {"kd": {}}} | made.config
    (workdir / "config.json").write_text(json.dumps(job))
    (folder / "config.json").write_text(json.dumps(made.config))
    (folder / "manifest.json").write_text(json.dumps(made.manifest))
    text = made.text()
    (folder / "metrics.jsonl").write_bytes(text[: len(text) - cut])
    if made.row and not cut:
        (folder / "result.json").write_text(json.dumps({"row": made.row}))
        (workdir / "results.json").write_text(json.dumps({"metric": "nll", "minimize": True, "rows": [made.row]}))
    return workdir


def run(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "jaxdistill.doctor", *map(str, args)], cwd=ROOT, capture_output=True, text=True)


def test_what_a_newcomer_reads(tmp_path, capsys):
    assert doctor.main(["doctor", str(write(tmp_path, not_stepping()))]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("1. optimizer_not_stepping error run kd-0 evidence no bit of any parameter changed in 200 updates")
    assert "cause the update is computed and not applied" in said
    assert "cure inspect what calls tx.update" in said
    assert "see experiments/doctor/README.md#optimizer_not_stepping" in said
    assert "looked at kd-0 (finished, 200 updates)" in said


def test_what_a_machine_reads(tmp_path, capsys):
    assert doctor.main(["doctor", str(write(tmp_path, not_stepping())), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found == [finding._asdict() for finding in diagnosis.diagnose(tmp_path)]
    assert found[0].keys() == {"name", "severity", "evidence", "cause", "cure", "study", "run"}
    assert found[0]["name"] == "optimizer_not_stepping"


def test_notes_and_health_are_no_failure(tmp_path, capsys):
    assert doctor.main(["doctor", str(write(tmp_path / "a", classifier()))]) == 0
    assert capsys.readouterr().out.startswith("nothing is wrong; looked at kd-0")
    assert doctor.main(["doctor", str(write(tmp_path / "b", overfits_at_the_end()))]) == 0
    assert "1. overfitting note" in " ".join(capsys.readouterr().out.split())


def test_a_crashed_run(tmp_path, capsys):
    """Half a line at the end, no result: judged by what is there."""
    assert doctor.main(["doctor", str(write(tmp_path, not_stepping(), cut=30))]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "optimizer_not_stepping" in said
    assert "1 broken line left out" in said


def test_a_run_that_has_just_begun(tmp_path, capsys):
    write(tmp_path, classifier(2), cut=1)
    (tmp_path / "runs/kd-0/metrics.jsonl").unlink()
    (tmp_path / "runs/kd-0/manifest.json").unlink()
    assert doctor.main(["doctor", str(tmp_path)]) == 0
    assert "looked at kd-0 (update 0 of 2)" in capsys.readouterr().out
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert doctor.main(["doctor", str(tmp_path)]) == 0
    assert "no run has begun yet" in capsys.readouterr().out


@pytest.mark.parametrize("args", [[], ["a", "b"], ["a", "--what"]])
def test_usage(args):
    with pytest.raises(UserError, match=r"usage: python -m jaxdistill\.doctor WORKDIR"):
        doctor.main(["doctor", *args])


def test_no_workdir_is_one_line(tmp_path):
    done = run(tmp_path / "nothing")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: workdir {tmp_path}/nothing: no such folder; accepted:")


def test_it_starts_fast_and_without_jax(tmp_path):
    write(tmp_path, classifier())
    code = ("import sys, time; from jaxdistill import doctor; doctor.main(['doctor', sys.argv[1]]); "
            "print(time.process_time()); sys.exit('jax' in sys.modules)")  # fmt: skip
    since = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1.5
    assert time.monotonic() - since < 60


def test_whoever_reads_may_stop(tmp_path):
    """As `| head -1` does."""
    workdir = write(tmp_path / "a", not_stepping())
    command = [sys.executable, "-c", "from jaxdistill import doctor; doctor.cli()", str(workdir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as told:
        told.stdout.close()  # before anything is printed
        assert told.stderr.read() == ""
    assert told.returncode == 0
