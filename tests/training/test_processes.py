"""Two processes of four devices are one process of eight, and each can go on where the other stopped or died."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.training import distributed, loop, sharding, store, watch
from tests import jobs

CONFIG = Path(__file__).with_name("twin_config.py")


def start(workdir: Path, *moments: str, variant: str = "", devices: int = 4, **keys) -> list[subprocess.Popen]:
    """A process for each moment, on one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--config={CONFIG}{variant}", f"--workdir={workdir}", f"--config.cache={workdir}-cache", "--meet_seconds=60",
             f"--coordinator=127.0.0.1:{port}", f"--num_processes={len(moments)}",
             *(f"--config.{key}={value}" for key, value in keys.items())]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TWIN_DEVICES": str(devices)}
    return [
        subprocess.Popen([sys.executable, "-m", "tests.training.twin", moment, *flags, f"--process_id={index}"],
                         env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for index, moment in enumerate(moments)
    ]


def finish(twins) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    try:
        said = [twin.communicate(timeout=240) for twin in twins]
    finally:
        for twin in twins:  # one that waits for the other would wait on
            twin.kill()
    return [(twin.returncode, *both) for twin, both in zip(twins, said, strict=True)]


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "runs/toy-0/metrics.jsonl").read_text().splitlines()]


def exported(workdir: Path) -> np.ndarray:
    return np.frombuffer((workdir / "runs/toy-0/export/params").read_bytes(), np.float32)


def on(config, mesh, folder: Path):
    config.mesh, config.cache = mesh, str(folder / "cache")
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module", autouse=True)
def ran(folder):
    """The same job by two processes and by one; and a smaller one, by two of one device each that are told to stop, and by one."""
    both = start(folder / "two", "nothing", "nothing", variant=":pair")
    cut = start(folder / "cut", "slowly", "told to stop", devices=1, mesh="(2, 1, 1)", **{"train.steps": 40})
    loop.run(on(jobs.pair(fit=True), (4, 2, 1), folder), folder / "one", quiet=True)
    longer = on(jobs.toy(), (4, 2, 1), folder)
    longer.train.steps = 40
    loop.run(longer, folder / "uncut", quiet=True)
    return finish(both), finish(cut)


def test_two_are_one(folder, ran):
    assert [code for code, *_ in ran[0]] == [0, 0], ran[0]
    np.testing.assert_allclose(exported(folder / "two"), exported(folder / "one"), atol=1e-5)
    a, b = lines(folder / "two"), lines(folder / "one")
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for one, other in zip(a, b, strict=True):
        if "loss" in one:
            assert one["probes"] == other["probes"]  # the same batches, in the same order
            np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)
    read = lambda name: json.loads((folder / name / "results.json").read_text())["rows"]  # noqa: E731
    for one, other in zip(read("two"), read("one"), strict=True):
        np.testing.assert_allclose(one["error"], other["error"], rtol=1e-5)


def test_only_the_first_writes_and_speaks(folder, ran):
    (_, out, said), other = ran[0]
    assert "toy-0" in out
    assert (folder / "two/report.html").exists()
    assert said == ""
    assert other == (0, "", "")


def test_all_stop_where_one_is_told_to(folder, ran):
    first, other = ran[1]
    assert (first[0], first[2]) == (75, f"interrupted; saved in {folder / 'cut'}. The same command goes on from here\n")
    assert other == (75, "", "")
    assert 4 <= lines(folder / "cut")[-1]["step"] < 40


def test_one_goes_on_where_two_stopped(folder, ran):
    longer = on(jobs.toy(), (8, 1, 1), folder)
    longer.train.steps = 40
    loop.run(longer, folder / "cut", quiet=True)
    np.testing.assert_allclose(exported(folder / "cut"), exported(folder / "uncut"), atol=1e-5)
    orders = lambda name: [line["probes"]["order"] for line in lines(folder / name) if "loss" in line]  # noqa: E731
    assert orders("cut") == orders("uncut")


def test_killed_and_started_again_they_end_as_if_nothing_had_been(folder, ran):
    """One dies, and the other stops with a line; both die at once, in a save; the first dies; and then they are let alone."""
    again = lambda *moments: finish(start(folder / "killed", *moments, variant=":pair"))  # noqa: E731
    first, second = again("nothing", "killed early")  # (still in the teacher's run)
    assert (first[0], second[0]) == (watch.GONE, -signal.SIGKILL)
    assert first[2].startswith("error: process 1 of 2 is gone (no sign of life for 10 s); ")
    assert first[2].endswith(" Start all of them again with the same command\n")
    assert first[2].count("\n") == 1
    assert [code for code, *_ in again("killed in a save", "killed in a save")] == [-signal.SIGKILL] * 2
    first, second = again("killed between two checkpoints", "nothing")
    assert (first[0], second[:2]) == (-signal.SIGKILL, (watch.GONE, ""))
    assert "process 0 of 2 is gone" in second[2]
    assert re.search(r"; toy-0 is saved up to update (8|9) and goes on from there\. ", second[2])
    assert second[2].count("\n") == 1
    assert [code for code, *_ in again("nothing", "nothing")] == [0, 0]
    assert np.array_equal(exported(folder / "killed"), exported(folder / "two"))
    assert lines(folder / "killed") == lines(folder / "two")
    read = lambda name: [{key: value for key, value in row.items() if key != "seconds"}  # noqa: E731
                         for row in json.loads((folder / name / "results.json").read_text())["rows"]]
    assert read("killed") == read("two")


def test_all_are_refused_where_another_job_works(folder):
    with store.alone(folder / "held"):
        first, other = finish(start(folder / "held", "nothing", "nothing"))
    assert first == (2, "", f"error: workdir {folder / 'held'}: another process is writing it; accepted: one at a time\n")
    assert other == (2, "", "")


def test_processes_that_do_not_meet_say_so(folder):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        flags = [f"--config={CONFIG}", f"--workdir={folder / 'alone'}", "--num_processes=2", "--meet_seconds=1"]
        command = [sys.executable, "-m", "tests.training.twin", "nothing", *flags]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        tried = [subprocess.Popen([*command, f"--coordinator=127.0.0.1:{number}", f"--process_id={index}"], env=env, stderr=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True) for index, number in ((0, port), (1, port - 1))]
        busy, late = finish(tried)
    assert busy == (2, "", f"error: --coordinator: found 127.0.0.1:{port}, on this machine Address already in use; accepted: a free port\n")
    assert late[0] == 2
    assert late[2] == (f"error: --coordinator: found that not all processes met at 127.0.0.1:{port - 1} within 1 s; accepted: all of them "
                       "started, each with its own --process_id, and process 0 where the others can reach it\n")
    assert not (folder / "alone").exists()


@pytest.mark.parametrize(("flags", "said"), [
    (("127.0.0.1:1", 2, None), "--process_id: missing; accepted: --coordinator=HOST:PORT"),
    ((None, None, 1), "--coordinator: missing"),
    (("127.0.0.1", 2, 0), "--coordinator: found '127.0.0.1'; accepted: HOST:PORT of process 0"),
    (("127.0.0.1:1", 2, 2), "--process_id: found 2; accepted: 0 to 1, each once"),
    (("127.0.0.1:1", 0, 0), "--num_processes: found 0; accepted: 1 or more"),
])
def test_half_given_flags_are_one_line(flags, said):
    with pytest.raises(UserError) as caught:
        distributed.check(*flags, False)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("found", [
    {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
    {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"},
])
def test_a_launcher_of_several_is_not_taken_for_one(monkeypatch, found):
    """Else each of them would do the same job in the same folder."""
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="processes .*, which would all do the same in one place; accepted: .*--distributed"):
        distributed.check(None, None, None, False)
    distributed.check(None, None, None, True)
    for name in found:
        if "HOSTNAMES" not in name and not name.endswith(("ID", "RANK")):
            monkeypatch.setenv(name, "1")
            distributed.check(None, None, None, False)


def test_a_mesh_that_gives_processes_the_same_rows_is_refused(monkeypatch):
    """Each process reads its own part of the batch: on (1, 1, 8) over two, they would put different rows in one place."""
    mesh = sharding.make_mesh((1, 1, 8))
    sharding.check_batch(16, 1, mesh)
    monkeypatch.setattr(sharding.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="2 processes"):
        sharding.check_batch(16, 1, mesh)
