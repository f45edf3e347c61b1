"""Every fault is noticed: its check passes on the library as it is, and fails with the fault in it."""

import inspect

import pytest
from _pytest.outcomes import Failed

from jaxdistill.training.loop import Sick
from tests.mutations.mutations import MUTATIONS
from tests.mutations.planting import planted

NOTICED = (AssertionError, Failed, Sick)  # not any other: an error in the mutant itself is no check of ours that noticed it


HEALTHY = set()  # the checks that have passed on the library as it is; several faults share one


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_it_is_noticed(mutation, request, tmp_path):
    given = {name: request.getfixturevalue(name) for name in inspect.signature(mutation.check).parameters}

    def check(folder: str):
        own = {"tmp_path": tmp_path / folder} if "tmp_path" in given else {}
        for path in own.values():
            path.mkdir()
        mutation.check(**given | own)

    if mutation.check not in HEALTHY:
        check("as it is")
        HEALTHY.add(mutation.check)
    with planted(mutation), pytest.raises(NOTICED):
        check("with the fault")


def test_there_are_enough_and_each_has_a_name_of_its_own():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(names) >= 30
    assert len(set(names)) == len(names)
