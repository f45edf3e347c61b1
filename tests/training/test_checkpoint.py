"""Checkpoints: what was saved comes back bit for bit, or is refused aloud."""

import functools
import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.training import sharding
from jaxdistill.training.checkpoint import Checkpoints, Damaged
from jaxdistill.training.state import TrainState


@functools.cache
def state(step: int, mesh=(1, 1, 1)) -> TrainState:
    """A state with everything that a state may hold: None leaves, a typed key, halves, NaN and minus zero."""
    rng = np.random.default_rng(step)
    kernel = rng.normal(size=(8, 4)).astype(np.float32)
    kernel[0, :3] = [np.nan, -0.0, np.inf]
    tree = TrainState(
        step=np.int32(step), params={"body": {"kernel": kernel}, "still": np.ones(3, np.float32)},
        opt=[{"body": {"kernel": rng.normal(size=(8, 4)).astype(jnp.bfloat16)}, "still": None}, np.int32(step)],
        extra={"mean": rng.normal(size=8).astype(np.float32)}, ema={"body": {"kernel": kernel + 1}, "still": None},
        ema_weight=np.float32(0.5), skipped=np.int32(0), streak=np.int32(0), controls={"lr": np.float32(1.0)},
        rng=jax.random.key(step),
    )
    rules = ((r"kernel", jax.P(("data", "fsdp"), None)),)
    return sharding.put(tree, sharding.shardings(tree, rules, sharding.make_mesh(mesh)))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def data(taken: int = 0):
    iterator = iter(grain.MapDataset.range(100).seed(3).shuffle().repeat().to_iter_dataset(grain.ReadOptions(num_threads=0)))
    for _ in range(taken):
        next(iterator)
    return iterator


def memory(step: int) -> dict:
    return {"seen": list(range(step)), "stop": "", "seconds": step / 3}


def bits(tree) -> list[bytes]:
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return [np.asarray(plain(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def save(folder: Path, steps, monitors=None, **options) -> None:
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, state(step), data(step), memory(step), monitors and monitors.get(step))
    checkpoints.close()


def restored(folder: Path, mesh=(1, 1, 1)) -> tuple[int, list[str]]:
    """The step that came back, after asserting that all of it is that step's, and the lines that were said."""
    said, iterator = [], data()
    checkpoints = Checkpoints(folder)
    found, remembered = checkpoints.restore(abstract(state(0, mesh)), iterator, said.append)
    checkpoints.close()
    step = int(found.step)
    assert bits(found) == bits(state(step))
    assert jax.tree.structure(found) == jax.tree.structure(state(step))
    assert remembered == memory(step)
    assert next(iterator) == next(data(step))
    return step, said


def reopened(folder: Path, **options) -> Checkpoints:
    checkpoints = Checkpoints(folder, **options)
    checkpoints.restore(abstract(state(0)), data())
    return checkpoints


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Checkpoints of updates 3 and 6."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save(folder, (3, 6), {3: 0.5, 6: 0.4})
    return folder


def test_what_was_saved_comes_back(two):
    assert restored(two) == (6, [])


def test_on_another_mesh(two):
    assert restored(two, mesh=(4, 2, 1)) == (6, [])


def test_none_where_there_is_none(tmp_path):
    assert Checkpoints(tmp_path / "none").restore(abstract(state(0)), data()) is None


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    now = sharding.put(state(3), jax.tree.map(lambda x: x.sharding, state(3)))
    checkpoints.save(3, now, data(3), memory(3))
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x + 1, tree),
                    donate_argnums=0)
    spoil(now)
    checkpoints.close()
    assert restored(tmp_path) == (3, [])


class TestKept:
    def test_the_last_two_and_the_best(self, tmp_path):
        save(tmp_path, (1, 2, 3, 4, 5, 6), {1: 0.9, 2: 0.1, 4: 0.1, 5: 0.3})
        checkpoints = reopened(tmp_path)
        assert checkpoints.steps == [2, 5, 6]
        assert checkpoints.best == 2  # the earlier of equals
        found, remembered = checkpoints.load(2, abstract(state(0)))
        assert bits(found) == bits(state(2))
        assert remembered == memory(2)

    def test_the_best_survives_reopening(self, tmp_path):
        save(tmp_path, (1, 2), {1: 0.1, 2: 0.9})
        for step in (3, 4, 5):
            checkpoints = reopened(tmp_path)
            checkpoints.save(step, state(step), data(step), memory(step), 0.5)
            checkpoints.close()
        assert reopened(tmp_path).steps == [1, 4, 5]
        assert reopened(tmp_path).best == 1

    def test_larger_may_be_better(self, tmp_path):
        save(tmp_path, (1, 2, 3, 4), {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.2}, minimize=False)
        assert reopened(tmp_path, minimize=False).best == 2

    def test_what_is_not_a_number_is_never_the_best(self, tmp_path):
        save(tmp_path, (1, 2, 3, 4), {1: float("nan"), 2: 0.9, 3: float("nan"), 4: 1.0})
        assert reopened(tmp_path).best == 2

    def test_no_best_without_a_monitor(self, tmp_path):
        save(tmp_path, (1, 2, 3))
        assert reopened(tmp_path).best is None


def flip(path: Path, at: float, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(at * len(content)), len(content) - 1)] ^= 1 << bit
    path.write_bytes(content)


DAMAGES = {
    "a bit in the middle": lambda path: flip(path, 0.5, 0),
    "a bit near the end": lambda path: flip(path, 0.9, 1),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    "gone": Path.unlink,
}


# Orbax leaves what it was reading beside a damaged file to the garbage collector, which complains.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestDamage:
    @pytest.fixture(autouse=True)
    @classmethod
    def little_garbage(cls):
        """What other tests left in this process: else each damaged checkpoint is a second of looking through it."""
        gc.freeze()
        yield
        gc.unfreeze()

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_of_any_file_gives_the_same_or_the_previous(self, two, tmp_path, damage):
        """Never other values, never a traceback."""
        files = sorted(path.relative_to(two) for path in (two / "6").glob("**/*") if path.is_file() and path.stat().st_size)
        assert len(files) > 8
        previous = 0
        for file in files:
            folder = tmp_path / str(file).replace("/", "_")
            shutil.copytree(two, folder)
            DAMAGES[damage](folder / file)
            step, said = restored(folder)
            assert step in (3, 6), file
            assert bool(said) == (step == 3), file  # going back is said, and only that
            assert all("\n" not in line and str(folder / "6") in line for line in said), file
            previous += step == 3
        assert previous >= 3

    def test_the_run_goes_on_over_a_damaged_checkpoint(self, two, tmp_path):
        folder = tmp_path / "run"
        shutil.copytree(two, folder)
        (folder / "6" / "state" / "manifest.ocdbt").write_bytes(b"")
        checkpoints = Checkpoints(folder)
        found, _ = checkpoints.restore(abstract(state(0)), data(), lambda line: None)
        assert int(found.step) == 3
        for step in (4, 6):
            checkpoints.save(step, state(step), data(step), memory(step), 0.4)
        checkpoints.close()
        assert Checkpoints(folder).steps == [4, 6]
        assert restored(folder) == (6, [])

    def test_of_all_is_an_error(self, two, tmp_path):
        folder = tmp_path / "run"
        shutil.copytree(two, folder)
        for step in (3, 6):
            (folder / str(step) / "state" / "manifest.ocdbt").write_bytes(b"")
        said = []
        with pytest.raises(UserError, match="all damaged"):
            Checkpoints(folder).restore(abstract(state(0)), data(), said.append)
        assert len(said) == 2
        assert {path.name for path in folder.iterdir()} >= {"3", "6"}  # nothing is thrown away

    def test_of_arrays_that_still_load_is_seen(self, two, tmp_path):
        """What a storage layer without checksums would hand back: a sealed memory of other arrays."""
        folder = tmp_path / "run"
        shutil.copytree(two, folder)
        shutil.rmtree(folder / "6" / "state")
        shutil.copytree(folder / "3" / "state", folder / "6" / "state")
        assert restored(folder)[0] == 3


def test_another_tree_is_a_mistake_and_no_damage(two):
    other = state(0)
    other = other.replace(params=other.params | {"more": other.extra["mean"]})
    with pytest.raises(UserError, match="params/more") as caught:
        Checkpoints(two).restore(abstract(other), data())
    assert not isinstance(caught.value, Damaged)
    assert "\n" not in str(caught.value)
    other = other.replace(params={"body": {"kernel": other.extra["mean"]}, "still": other.params["still"]})
    with pytest.raises(UserError, match=r"params/body/kernel \[\[8, 4\]"):
        Checkpoints(two).restore(abstract(other), data())


KILLED = """
    import os, signal, sys, threading, time
    from pathlib import Path
    from tests import conftest
    from tests.training import test_checkpoint as t
    folder, delay = Path(sys.argv[1]), float(sys.argv[2])
    checkpoints = t.Checkpoints(folder)
    checkpoints.save(3, t.state(3), t.data(3), t.memory(3))
    checkpoints.wait()
    six = t.state(6), t.data(6), t.memory(6)
    threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    checkpoints.save(6, *six)
    time.sleep(60)
"""


def test_a_kill_during_a_save_leaves_the_previous(tmp_path):
    children = {}
    for delay in (0.001, 0.02, 0.06):
        folder = tmp_path / str(delay)
        children[folder] = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), folder, str(delay)],
                                            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    for folder, child in children.items():
        assert child.wait(240) == -signal.SIGKILL
        step, said = restored(folder)
        assert step in (3, 6)
        assert said == []
        save(folder, (9,))
        assert restored(folder) == (9, [])
