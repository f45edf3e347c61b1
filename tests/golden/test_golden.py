"""Three updates of each shipped recipe against recorded numbers (see README.md for when to change them)."""

import json
import os
from pathlib import Path

import pytest

from jaxdistill.training import plan, prepare, sharding
from jaxdistill.training.metrics import record
from tests.recipes.conftest import config, job  # noqa: F401  (a fixture)

FILE = Path(__file__).with_name("one_step.json")


def measured(job, recipe: str) -> dict:  # noqa: F811
    c = config(job)
    c.run.kd.recipe = recipe
    c.train.ema = 0.9
    if recipe == "lm":
        c.model = dict(c.student)
    one = prepare.prepare(prepare.build(plan.expand(c)[0]), sharding.make_mesh((1, 1, 1)))
    data, state, lines = one.built.recipe.data("train", 0), one.state, []
    for number in range(1, 4):
        state, metrics = one.step(state, one.frozen, one.place(next(data)))
        lines.append(record(number, metrics))
    found = {key: value for key, value in plan.leaves(lines[-1]).items() if key != "gap"}
    return found | {"first loss": lines[0]["loss"], **prepare.evaluate(one, state.params, {}, test=True, cache={})}


@pytest.mark.parametrize("recipe", ["lm", "student_aware"])
def test_three_updates(job, recipe):  # noqa: F811
    found = measured(job, recipe)
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("JAXDISTILL_UPDATE_GOLDEN"):
        FILE.write_text(json.dumps(golden | {recipe: found}, indent=1, sort_keys=True) + "\n")
    else:
        known = {key: found.get(key) for key in golden[recipe]}  # a key that came since then is no change of a number
        assert known == pytest.approx(golden[recipe], rel=1e-4, abs=1e-7)
