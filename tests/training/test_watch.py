"""Of several processes, what ends one ends all, each with its exit code and with one line."""

import os
import signal
import subprocess
import sys

import pytest


def together(folder, *acts: str) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of processes that act so."""
    command = [sys.executable, "-m", "tests.training.watched", folder]
    started = [subprocess.Popen([*command, str(index), str(len(acts)), act], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for index, act in enumerate(acts)]
    ended = []
    for process, act in sorted(zip(started, acts, strict=True), key=lambda pair: pair[1] == "hang"):  # one that hangs ends last, by us
        if act == "hang":
            process.kill()
        ended.append((process, (process.communicate(timeout=60))))
    return [(process.returncode, *dict(ended)[process]) for process in started]


def test_one_that_fails_ends_all_with_its_line(tmp_path):
    first, second, third = together(tmp_path, "work", "fail", "work")
    assert first == (2, "", "error: process 1: data: found 0; accepted: 1\n")
    assert second == third == (2, "", "")


def test_what_all_say_is_said_once(tmp_path):
    assert together(tmp_path, "fail", "fail") == [(2, "", "error: data: found 0; accepted: 1\n"), (2, "", "")]


def test_the_failure_of_the_first_ends_the_others(tmp_path):
    assert together(tmp_path, "fail", "work") == [(2, "", "error: data: found 0; accepted: 1\n"), (2, "", "")]


@pytest.mark.parametrize("act", ["die", "hang"])
def test_one_that_is_silent_is_gone(tmp_path, act):
    (tmp_path / "checkpoints/8").mkdir(parents=True)
    (tmp_path / "checkpoints/12.orbax-checkpoint-tmp").mkdir()
    first, second = together(tmp_path, "work", act)
    assert first[:2] == (70, "")
    assert first[2] == ("error: process 1 of 2 is gone (no sign of life for 3 s); toy-0 is saved up to update 8 and goes on from there. "
                        "Start all of them again with the same command\n")
    assert second[0] == -signal.SIGKILL


def test_the_first_may_be_gone_too(tmp_path):
    second = together(tmp_path, "die", "work")[1]
    assert second[:2] == (70, "")
    assert second[2] == ("error: process 0 of 2 is gone (no sign of life for 3 s); of toy-0 nothing is saved yet. "
                         "Start all of them again with the same command\n")


def test_a_lost_connection_shortens_the_wait(tmp_path):
    assert "no sign of life for 1 s" in together(tmp_path, "lose a connection", "die")[0][2]


def test_the_abort_of_jax_is_one_line_too(tmp_path):
    """Where process 0 is gone, JAX's coordination service ends the others from C++."""
    code, out, said = together(tmp_path, "lose the service")[0]
    assert (code, out) == (70, "")
    assert said.startswith("error: process 0 of 1 is gone (its connection is closed)")
    assert said.count("\n") == 1


def test_the_abort_of_jax_before_all_met_is_the_users(tmp_path):
    assert together(tmp_path, "do not meet") == [(2, "", "error: not met: True\n")]


def test_another_abort_stays_one(tmp_path):
    code, _, said = together(tmp_path, "abort")[0]
    assert code == -signal.SIGABRT
    assert said == "free(): invalid pointer\n"


def test_noise_is_kept_quiet_and_nothing_else(tmp_path):
    assert together(tmp_path, "close", "close") == [(0, "something else\n", "")] * 2


def test_noise_in_pieces_is_noise_too(tmp_path):
    assert together(tmp_path, "close later", "close later") == [(0, "something else\nand more", "")] * 2
