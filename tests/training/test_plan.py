"""What a run is made from: the keys that it reads, and no others."""

import pytest

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
