"""Two processes of four devices are one process of eight, and each can go on where the other stopped."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.training import loop, sharding
from tests import jobs


def start(workdir: Path, *more: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return [
        subprocess.Popen([sys.executable, "-m", "tests.training.twin", str(port), str(index), workdir, *more],
                         env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for index in (0, 1)
    ]


def finish(twins) -> tuple[list[int], list[str]]:
    try:
        said = [twin.communicate(timeout=240)[0] for twin in twins]
    finally:
        for twin in twins:  # one that waits for the other would wait on
            twin.kill()
    return [twin.returncode for twin in twins], said


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
    """The same job by two processes and by one; and a smaller one, by two that are stopped and by one."""
    both, cut = start(folder / "two"), start(folder / "cut", "signal")
    loop.run(on(jobs.pair(), (4, 2, 1), folder), folder / "one", quiet=True)
    loop.run(on(jobs.toy(), (4, 2, 1), folder), folder / "uncut", quiet=True)
    return finish(both), finish(cut)


def test_two_are_one(folder, ran):
    codes, said = ran[0]
    assert codes == [0, 0], said
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


def test_only_the_first_writes_and_speaks(ran):
    said = ran[0][1]
    assert "toy-0" in said[0]
    assert "toy-0" not in said[1]


def test_all_stop_where_one_is_told_to(folder, ran):
    codes, said = ran[1]
    assert codes == [75, 75], said
    assert lines(folder / "cut")[-1]["step"] == 10  # where processes next agree


def test_one_goes_on_where_two_stopped(folder, ran):
    loop.run(on(jobs.toy(), (8, 1, 1), folder), folder / "cut", quiet=True)
    np.testing.assert_allclose(exported(folder / "cut"), exported(folder / "uncut"), atol=1e-5)
    orders = lambda name: [line["probes"]["order"] for line in lines(folder / name) if "loss" in line]  # noqa: E731
    assert orders("cut") == orders("uncut")


def test_a_mesh_that_gives_processes_the_same_rows_is_refused(monkeypatch):
    """Each process reads its own part of the batch: on (1, 1, 8) over two, they would put different rows in one place."""
    mesh = sharding.make_mesh((1, 1, 8))
    sharding.check_batch(16, 1, mesh)
    monkeypatch.setattr(sharding.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="2 processes"):
        sharding.check_batch(16, 1, mesh)
