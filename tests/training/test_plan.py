"""What a run is made from: the keys that it reads, and no others."""

import importlib
import inspect
import linecache
import sys
import types

import pytest
from absl import flags
from ml_collections import config_flags

from configs import kd
from jaxdistill import UserError
from jaxdistill.training import loop, plan, prepare
from tests import jobs


def identity(**changes):
    config = jobs.pair()
    config.other = dict(temperature=1.0)
    config.update_from_flattened_dict(changes)
    one = plan.expand(config)[0]
    return plan.identity(one, prepare.build(one).recipe.facts)


def test_keys_of_other_runs_do_not_make_another_teacher():
    assert identity() == identity(**{"other.temperature": 2.0}) == identity(headline="")


@pytest.mark.parametrize("change", [{"toy.contrast": 0.2}, {"run.teacher.train.steps": 5}, {"optimizer.b1": 0.8}, {"seeds": (3,)}])
def test_every_key_that_it_reads_does(change):
    assert identity() != identity(**change)


class TestCode:
    """A recipe from outside the package is what its source says, whatever it is called."""

    TEXT = "from tests import toy\n\n\ndef make(config):\n    return toy.make(config)\n"

    @pytest.fixture
    def mine(self, tmp_path, monkeypatch):
        """A module of a file of its own."""
        file = tmp_path / "mine" / "edited.py"
        file.parent.mkdir()
        file.write_text(self.TEXT)
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("mine", "mine.edited"):  # (another test's)
            monkeypatch.delitem(sys.modules, name, raising=False)
        return file

    def of(self, recipe: str) -> dict:
        return identity(**{"run.teacher.recipe": recipe})

    def test_edited_it_is_another_run(self, mine):
        before = self.of("mine.edited")
        mine.write_text(self.TEXT + "# edited\n")
        assert self.of("mine.edited") == before  # what was imported is what runs
        importlib.reload(sys.modules["mine.edited"])
        (found,) = plan.difference(before, self.of("mine.edited"))
        assert found.startswith("recipe's code (there ")

    def test_edited_while_the_old_one_is_loaded_it_is_refused(self, mine, tmp_path):
        config = jobs.toy()
        config.run.toy.recipe = "mine.edited"
        loop.check(config, tmp_path)
        mine.write_text(self.TEXT + "# edited\n")
        with pytest.raises(UserError, match="^recipe: found 'mine.edited' edited since it was imported; accepted: a restart"):
            loop.check(config, tmp_path)

    def test_a_module_without_a_file(self, monkeypatch):
        """Its functions know the cell that they come from; where nothing does, nothing is said."""
        found = []
        for cell, text in (("cell 1", self.TEXT), ("cell 2", self.TEXT.replace("(config)\n", "(config)  # edited\n")), ("", self.TEXT)):
            module = types.ModuleType("no.file")
            exec(compile(text, cell, "exec"), module.__dict__)
            monkeypatch.setitem(sys.modules, "no.file", module)
            if cell:
                monkeypatch.setitem(linecache.cache, cell, (len(text), None, text.splitlines(True), cell))
                assert inspect.getsource(module.make)
            found.append(self.of("no.file").get("recipe's code"))
        assert len(set(found)) == 3
        assert found[2] is None

    def test_the_package_s_own_are_told_by_its_version(self):
        config = plan.expand(kd.get_config("smoke"))[0]
        assert "recipe's code" not in plan.identity(config, {})


def test_a_run_for_some_seeds_only():
    config = jobs.pair()
    config.seeds = (0, 1, 2)
    config.run.toy.only_seeds = (1, 2, 7)
    assert [run.id for run in plan.expand(config)] == ["teacher-0", "toy-1", "toy-2"]
    assert [run.name for run in plan.expand(config, everything=True)] == ["teacher", "toy"]


class TestFolders:
    """What a key that a run fills may hold instead: nothing, a folder, or several."""

    @pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections'
    @pytest.mark.parametrize(("flag", "wanted"), [
        ("", ""), ("a", "a"), ("('a', 'b')", ("a", "b")), ("('a',)", ("a",)), ("(not, a, tuple)", "(not, a, tuple)"),
    ])
    @pytest.mark.parametrize("typed", [True, False])
    def test_a_flag(self, tmp_path, flag, wanted, typed):
        """typed: of a config whose key takes any type, as the shipped one; else one whose key is a text."""
        text = "import configs.kd\n\n\ndef get_config():\n    c = configs.kd.get_config()\n"
        (tmp_path / "c.py").write_text(text + ("" if typed else "    c.teacher = dict(c.teacher)\n") + "    return c\n")
        values = flags.FlagValues()
        argv = ["prog", f"--config={tmp_path / 'c.py'}", f"--config.teacher.path={flag}"]
        holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        values(argv)
        runs = {run.name: run for run in plan.expand(holder.value)}
        assert runs["kd"].get("teacher.path") == wanted

    def test_each_is_measured_by_a_run_of_its_own(self):
        config = kd.get_config()
        config.teacher.path = ("a", "b")
        found = {run.name: (run.get("model.path"), run.get("train.steps")) for run in plan.expand(config)}
        assert list(found) == ["teacher_1", "teacher_2", "untouched", "ce_only", "kd", "ce_only_same_seconds"]
        assert (found["teacher_1"], found["teacher_2"]) == (("a", 0), ("b", 0))
        for one in ("a", ("a",)):
            config.teacher.path = one
            assert {run.name: run.get("model.path") for run in plan.expand(config)}["teacher"] == "a"

    def test_a_name_that_is_taken(self):
        config = kd.get_config()
        config.teacher.path = ("a", "b")
        config.run.teacher_2 = dict(recipe="lm")
        with pytest.raises(UserError, match="^config key run.teacher_2: found beside 2 folders in teacher.path, "):
            plan.expand(config)
