"""A job is a list of runs: once or for each seed, from the cache, each with what earlier ones give it, paced by others."""

import contextlib
import json
import math
import shutil

import numpy as np
import pytest

from jaxdistill import UserError, report
from jaxdistill.training import loop, plan, store
from tests import jobs, toy
from tests.jobs import changed, read


class TestJob:
    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls, tmp_path_factory):
        """Two seeds of a toy, taught by one teacher: (workdir, cache, results)."""
        folder = tmp_path_factory.mktemp("pair")
        config = changed(jobs.pair(), seeds=(0, 1), cache=str(folder / "cache"), **{"train.steps": 5})
        return folder / "job", folder / "cache", loop.run(config, folder / "job", quiet=True)

    def config(self, cache, **keys):
        return changed(jobs.pair(), seeds=(0, 1), cache=str(cache), **{"train.steps": 5}, **keys)

    def test_once_seeds_and_the_table(self, pair):
        workdir, _, results = pair
        assert [(row["name"], row["seed"]) for row in results["rows"]] == [("teacher", 0), ("toy", 0), ("toy", 1)]
        assert results["rows"][1]["error"] != results["rows"][2]["error"]
        assert read(workdir / "results.json") == results
        assert results["paired"][0]["b"] == "teacher"

    def test_what_one_run_fills_the_next_ones_take(self, pair):
        workdir, _, _ = pair
        values = read(workdir / "runs/toy-1/config.json")
        assert values["toy"]["teacher"] == str(workdir / "runs/teacher-0/export")
        identity = read(workdir / "runs/toy-1/result.json")["identity"]
        assert identity["config"]["toy.teacher"] == "runs/teacher-0"  # not the place it happened to lie
        assert identity["facts"]["teacher"] == store.folder_digest(workdir / "runs/teacher-0/export")

    def test_a_cached_run_starts_at_once(self, pair, tmp_path, monkeypatch):
        _, cache, results = pair
        trained, old = [], loop.train
        monkeypatch.setattr(loop, "train", lambda built, *a, **k: trained.append(built.run.id) or old(built, *a, **k))
        found = loop.run(self.config(cache), tmp_path / "again", quiet=True)
        assert trained == ["toy-0", "toy-1"]
        assert found["rows"][0] == results["rows"][0]
        assert [row["error"] for row in found["rows"]] == [row["error"] for row in results["rows"]]

    @pytest.mark.parametrize("file", ["result.json", "export/params"])
    def test_a_damaged_cache_entry_is_trained_again(self, file, pair, tmp_path, capsys):
        _, cache, results = pair
        shutil.copytree(cache, tmp_path / "cache")
        (entry,) = (tmp_path / "cache" / "runs").iterdir()
        (entry / file).write_text("{")
        config = changed(self.config(tmp_path / "cache"), seeds=(0,), runs=("teacher",), headline="")
        found = loop.run(config, tmp_path / "job", quiet=True)
        assert "damaged" in capsys.readouterr().out
        assert found["rows"][0]["error"] == results["rows"][0]["error"]
        (entry,) = (tmp_path / "cache" / "runs").iterdir()
        assert read(entry / "result.json")["row"] == found["rows"][0]  # mended

    def test_a_run_that_was_begun_as_another_is_refused_with_a_cache_entry_too(self, pair, tmp_path):
        """Its checkpoints stay; where it is the very run, the finished one takes its place."""
        workdir, cache, results = pair
        folder = tmp_path / "runs/teacher-0"
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(workdir / "config.json", tmp_path)
        identity = read(workdir / "runs/teacher-0/identity.json")
        for rows, refused in ((63, True), (64, False)):
            (folder / "identity.json").write_text(json.dumps(identity | {"facts": identity["facts"] | {"rows": rows}}))
            with pytest.raises(UserError, match=r"facts\.rows \(there 63, now 64\)") if refused else contextlib.nullcontext():
                assert loop.run(self.config(cache), tmp_path, quiet=True)["rows"][0] == results["rows"][0]
            assert (folder / "checkpoints").exists() == refused

    def test_a_cache_that_cannot_be_written_is_said_and_passed_over(self, tmp_path, capsys):
        (tmp_path / "file").touch()
        config = changed(self.config(tmp_path / "file"), seeds=(0,), runs=("teacher",), headline="")
        assert loop.run(config, tmp_path / "job", quiet=True)["rows"][0]["steps"] == 4
        assert "not kept" in capsys.readouterr().out

    def test_the_users_own_teacher_is_measured_and_not_trained(self, pair, tmp_path):
        workdir, cache, results = pair
        own = str(workdir / "runs/teacher-0/export")
        found = loop.run(self.config(cache, **{"toy.teacher": own}), tmp_path, quiet=True)
        assert found["rows"][0]["steps"] == 0
        np.testing.assert_allclose(found["rows"][0]["error"], results["rows"][0]["error"], rtol=1e-6)
        assert found["rows"][1]["error"] == results["rows"][1]["error"]
        assert not (tmp_path / "runs/teacher-0/metrics.jsonl").exists()

    def test_a_test_metric_that_is_not_finite_ends_no_job(self, tmp_path, monkeypatch, capsys):
        """The table, the doctor and the report are made of it, and the same command finds the runs as they were."""
        def make(config, old=toy.make):
            recipe = old(config)
            test = recipe.evaluators["test"]._replace(finish=lambda rows: {"error": math.nan if config.train.steps == 4 else 1.0})
            return recipe._replace(evaluators=recipe.evaluators | {"test": test})

        monkeypatch.setattr(toy, "make", make)
        config = self.config(tmp_path / "cache", **{"gates.ledger_gap": math.inf})  # a key of the identity, as JSON cannot write it
        for _ in range(2):
            found = loop.run(config, tmp_path / "job", quiet=True)
            assert [row["error"] for row in found["rows"]] == [pytest.approx(math.nan, nan_ok=True), 1.0, 1.0]
            monkeypatch.setattr(loop, "train", None)
        assert (read(tmp_path / "job/results.json")["paired"][0]["mean"], found["paired"][0]["interval"]) == ("nan", None)
        assert report.main(["report", str(tmp_path / "job")]) == 0
        assert "toy and teacher cannot be compared by error: it is not finite" in capsys.readouterr().out

    def test_fills_without_given_or_export_is_an_error(self, tmp_path, monkeypatch):
        config = jobs.pair()
        config.toy.teacher, config.run.teacher.given = "somewhere", ""
        with pytest.raises(UserError, match=r"run\.teacher\.given: missing"):
            loop.run(config, tmp_path / "a", quiet=True)
        monkeypatch.setattr(toy, "export", None)
        with pytest.raises(UserError, match=r"run\.teacher\.fills: .*exports nothing"):
            loop.run(jobs.pair(), tmp_path / "b", quiet=True)

    def test_every_seed_takes_from_its_own(self, tmp_path):
        """A run that fills a key and is not `once`: toy-1 is taught by teacher-1, which nobody taught."""
        config = changed(jobs.pair(), seeds=(0, 1), **{"train.steps": 2, "run.teacher.once": False, "run.teacher.cached": False})
        loop.run(config, tmp_path, quiet=True)
        for seed in (0, 1):
            taken = read(tmp_path / f"runs/toy-{seed}/result.json")["identity"]["config"]["toy.teacher"]
            assert taken == f"runs/teacher-{seed}"
        assert read(tmp_path / "runs/teacher-1/config.json")["toy"]["teacher"] == ""


def test_seconds_of_and_pace_of():
    config = jobs.toy()
    config.runs = ("long", "short", "toy")
    config.run.long = config.run.short = dict(recipe="tests.toy")
    config.run.toy.update(seconds_of="long", pace_of="short")
    long, short, run = plan.expand(config)
    done = {"long-0": {"row": {"seconds": 10.0, "steps": 99}}, "short-0": {"row": {"seconds": 2.0, "steps": 8}}}
    loop.pace(run, done)
    assert run.get("train.steps") == 40  # 10 s at 8 updates in 2 s
    loop.pace(long, done)
    assert long.get("train.steps") == 12
    done["short-0"]["row"] = {"seconds": 0.0, "steps": 0}  # stopped before its first update: nothing to go by
    loop.pace(run, done)
    assert run.get("train.steps") == 40
    with pytest.raises(UserError, match=r"run\.toy\.seconds_of: found 'long'"):
        loop.pace(run, {})
