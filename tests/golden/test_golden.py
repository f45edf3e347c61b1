"""Three updates of each language recipe, and of one with every term, against recorded numbers (README.md: when to change them)."""

import json
import os
from pathlib import Path

import pytest

from jaxdistill.training import plan, prepare, sharding
from jaxdistill.training.metrics import record
from tests.recipes.conftest import config, job  # noqa: F401  (a fixture)

FILE = Path(__file__).with_name("one_step.json")
ON = dict(weight=((0.0, 0.5),))
EVERY = dict(  # no option of a term at its default, where that could stand in the code as well
    student=dict(depth=2, heads=4), lm=dict(smoothing=0.1), kd=dict(temperature=((0.0, 2.0), (1.0, 1.5))),
    hidden=dict(ON, projector="mlp", balance=0.1), attention=ON, contrastive=dict(ON, temperature=0.2),
    router=dict(ON, k=((0.0, 1.0), (0.2, 2.0)), temperature=((0.0, 1.0), (1.0, 0.5)), balance=0.1, lr_mult=3.0),
)
CASES = {"lm": {}, "student_aware": {}, "every_term": EVERY}


def measured(job, case: str) -> dict:  # noqa: F811
    c, recipe = config(job), "student_aware" if case == "every_term" else case
    c.update(CASES[case])
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


@pytest.mark.parametrize("case", CASES)
def test_three_updates(job, case):  # noqa: F811
    found = measured(job, case)
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("JAXDISTILL_UPDATE_GOLDEN"):
        FILE.write_text(json.dumps(golden | {case: found}, indent=1, sort_keys=True) + "\n")
    else:
        known = {key: found.get(key) for key in golden[case]}  # a key that came since then is no change of a number
        # A difference of two entropies of some 5 nats: their rounding, and not its own size, says how exact it is.
        small, wanted = known.pop("probes.spread"), golden[case].copy()
        assert small == pytest.approx(wanted.pop("probes.spread"), abs=4e-6)
        assert known == pytest.approx(wanted, rel=1e-4, abs=1e-7)
