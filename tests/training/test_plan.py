"""What a run is made from: the keys that it reads, and no others."""

import pytest
from absl import flags
from ml_collections import config_flags

from configs import kd
from jaxdistill import UserError
from jaxdistill.training import plan, prepare
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
