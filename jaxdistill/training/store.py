"""The workdir and the cache: what is claimed, begun, finished, and found again by content."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax

from jaxdistill import UserError, __version__, read_json
from jaxdistill.diagnosis.records import load
from jaxdistill.lock import only_writer
from jaxdistill.training import manifest, plan
from jaxdistill.training.distributed import share
from jaxdistill.training.metrics import plain_json, write_json

RUNNING = ".running"  # the lock of whoever works in the workdir
ASKED = ("seeds", "runs", "headline")  # which of the runs that a job defines are wanted, and how they are compared


def claim(workdir: Path, config: Any) -> Path:
    """`workdir`, made where it is not there: it must hold nothing, or a job of the same config, of which other seeds or runs may be
    asked: those that are finished are kept."""
    workdir = workdir.expanduser().absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"workdir {workdir}: {error.strerror}; accepted: a folder that can be written") from None
    share(lambda: _claim(workdir, config))
    return workdir


def _claim(workdir: Path, config: Any) -> None:
    path = workdir / "config.json"
    if path.exists():
        found = read_json(path)
        keys = plan.difference(*({key: value for key, value in job.items() if key not in ASKED} for job in (found, _job(config))))
        if keys:
            raise UserError(f"workdir {workdir}: found a job of another config, differing in {'; '.join(keys[:8])}; "
                            "accepted: the same config, or another --workdir")
    elif any(path for path in workdir.iterdir() if path.name != RUNNING and not path.name.startswith(".config.json.")):
        raise UserError(f"workdir {workdir}: found other files and no config.json; accepted: an empty folder or a job's own")


def alone(workdir: Path) -> contextlib.AbstractContextManager:
    """While it lasts, other jobs are refused in `workdir`. Process 0 sees to it: its refusal ends all processes."""
    return only_writer(workdir / RUNNING, f"workdir {workdir}") if jax.process_index() == 0 else contextlib.nullcontext()


def keep(workdir: Path, config: Any) -> None:
    """Makes a claimed `workdir` this job's, by its config.json; all processes must see it there, and be of the same job."""

    def write() -> dict:
        _claim(workdir, config)  # another may have come and gone since
        try:
            write_json(workdir / "config.json", _job(config))
        except OSError as error:
            raise UserError(f"workdir {workdir}: {error.strerror}; accepted: a folder that can be written, with room in it") from None
        return _job(config)

    keys = plan.difference(share(write), _job(config), sides=("process 0", "here"))
    if keys:
        raise UserError(f"config: found another than that of process 0, differing in {'; '.join(keys[:8])}; accepted: the same command "
                        "on all processes")
    for wait in (0, 1, 5, 30):  # a network file system may know of new files late
        time.sleep(wait)
        if (workdir / "config.json").exists():
            return
    raise UserError(f"workdir {workdir}: found here without the config.json that process 0 wrote; accepted: a folder that all processes "
                    "share")


def _job(config: Any) -> dict:
    """What makes two jobs the same; where and with how many devices they run does not."""
    return _plain({key: value for key, value in plan.as_dict(config).items() if key not in ("mesh", "cache")})


def begin(folder: Path, built, ready, want: dict) -> None:
    """The run's own folder, with its config and manifest; one that was begun as another run is refused."""
    path = folder / "identity.json"
    if jax.process_index() == 0:
        if path.exists():
            _same(folder, read_json(path), want)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, want)
        write_json(folder / "config.json", built.run.values)
        before = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
        write_json(folder / "manifest.json", manifest.describe(built, ready) | {"preflight": before.get("preflight")})


def finished(folder: Path, want: dict) -> dict | None:
    """The result of a finished run in `folder`, or None; one made from anything else is an error."""
    agreed(want)
    return share(lambda: _finished(folder, want))


def agreed(want: dict) -> None:
    """All processes must have made the same of the config."""
    keys = plan.difference(share(lambda: want), want, sides=("process 0", "here"))
    if keys:
        raise UserError(f"run: found made from something else than on process 0: {'; '.join(keys[:8])}; accepted: the same data, models "
                        "and versions on all processes")


def _finished(folder: Path, want: dict) -> dict | None:
    path = folder / "result.json"
    if not path.exists():
        return None
    result = load(path)
    _same(folder, result.get("identity", {}), want)
    if folder_digest(folder / "export") != result.get("export"):
        raise UserError(f"{folder / 'export'}: found contents that do not match result.json; accepted: the folder as the "
                        "run exported it (delete the run's folder to train it again)")
    return result


def _same(folder: Path, found: dict, want: dict) -> None:
    keys = plan.difference(_plain(found), _plain(want))
    if keys:
        raise UserError(f"{folder}: found a run made from something else: {'; '.join(keys[:8])}; "
                        "accepted: the same config, data and teacher, or another --workdir")


def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of a folder's files."""
    whole = hashlib.sha256()
    for path in sorted(folder.glob("**/*")) if folder.is_dir() else ():
        if path.is_file():
            whole.update(f"{path.relative_to(folder)}\0".encode())
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def cache_folder(config: Any) -> Path:
    chosen = plan.as_dict(config).get("cache")
    return Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxdistill").expanduser()


def _cached(want: dict, config: Any) -> Path:
    return cache_folder(config) / "runs" / plan.digest({"version": __version__, "identity": want})[:32]


def from_cache(folder: Path, want: dict, config: Any) -> dict | None:
    """The finished run of the same identity, copied from the cache; None where there is none intact."""
    return share(lambda: _from_cache(folder, want, config))


def _from_cache(folder: Path, want: dict, config: Any) -> dict | None:
    source = _cached(want, config)
    if not source.exists():
        return None
    if (folder / "identity.json").exists():  # begun here: this very run, which need not go on
        _same(folder, read_json(folder / "identity.json"), want)
    shutil.rmtree(folder, ignore_errors=True)
    _copy(source, folder)
    try:
        result = _finished(folder, want)
    except UserError as error:
        print(f"cache {source}: damaged ({error}); trained again")
        result = None
    if result is None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(source, ignore_errors=True)
    else:
        print(f"{folder.name}: found in the cache, trained before in {result['row']['seconds']:.0f} s ({source})")
    return result


def to_cache(folder: Path, want: dict, config: Any) -> None:
    """Keeps a finished run for later jobs; a cache that cannot be written is said and passed over."""
    if jax.process_index() != 0:
        return
    try:
        _copy(folder, _cached(want, config), ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    except OSError as error:
        print(f"cache {cache_folder(config)}: {error.strerror}; the run is not kept for later jobs")


def _copy(source: Path, target: Path, **options) -> None:
    """Whole or not at all."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, temporary, **options)
        if not target.exists():
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(plain_json(value)))
