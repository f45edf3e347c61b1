"""Several processes that want the same entry of the cache."""

import threading
import time

from jaxdistill.data import cache


def wanted(name: str, made: list, seconds: float = 0.2) -> bytes:
    def make() -> bytes:
        made.append(name)
        time.sleep(seconds)
        return b"value"

    return cache.cached(name, make=make, read=lambda file: file.read(), write=lambda value, file: file.write(value))


def test_one_makes_what_several_want(monkeypatch, tmp_path):
    """Each opens the lock by itself, as processes do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made, found = [], []
    several = [threading.Thread(target=lambda: found.append(wanted("entry", made))) for _ in range(4)]
    for one in several:
        one.start()
    for one in several:
        one.join()
    assert (made, found) == (["entry"], [b"value"] * 4)


def test_another_entry_does_not_wait(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []
    slow = threading.Thread(target=wanted, args=("slow", made, 1.0))
    slow.start()
    while not made:
        time.sleep(0.01)
    wanted("quick", made, 0.0)
    assert slow.is_alive()
    slow.join()


def test_a_folder_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "jaxdistill").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []
    assert wanted("entry", made, 0.0) == wanted("entry", made, 0.0) == b"value"
    assert len(made) == 2
