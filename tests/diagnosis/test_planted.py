"""The study of planted faults: it plants what it says, and on real runs the doctor reads it."""

import pytest

from experiments.doctor import cures, faults, planted
from jaxdistill.diagnosis import rules

NO_FAULT = {"padded"}  # what others need to show
CONFIG_ALONE = {"teacher_no_better", "lr_too_large", "weights_decaying_away", "target_unreachable", "lr_zero", "lr_too_small"}


def test_every_fault_is_planted_and_has_a_rule():
    assert set(faults.FAULTS) == {*planted.RECIPES, *planted.PATCHES} - NO_FAULT | CONFIG_ALONE
    assert not planted.RECIPES.keys() & planted.PATCHES.keys()
    assert {faults.OTHER.get(name, name) for name in faults.FAULTS} <= {rule.name for rule in rules.RULES}
    assert len(faults.FAULTS) >= 20
    assert len({job.config for job in faults.FAULTS.values()}) >= 4


@pytest.mark.parametrize(("fault", "first"), [("", ""), ("ledger_gap", "ledger_gap"), ("optimizer_not_stepping", "optimizer_not_stepping")])
def test_a_planted_fault_is_named(fault, first, tmp_path):
    job = faults.CITIES.but(data__cities=4, data__addresses=8, train__steps=24, train__eval_every=24)
    faults.train(job, 0, tmp_path / "job", fault)
    assert faults.verdict(tmp_path / "job")[0] == first


@pytest.mark.parametrize(("cure", "keys"), [
    ("lower it: --config.train.lr=0.001, or a longer warm-up (train.warmup)", {"train.lr": 0.001}),
    ("decouple it: --config.run.kd.optimizer.decay=decoupled; if it is so already, inspect", {"run.kd.optimizer.decay": "decoupled"}),
    ("fit it (--config.projector.init=lstsq), faster (--config.projector.lr_mult=10.0) and keep the gate (--config.projector.gate=True)",
     {"projector.init": "lstsq", "projector.lr_mult": 10.0, "projector.gate": True}),
    ("bring its size to that of the others: --config.hidden.weight='((0.0, 0.05),)', or --config.react.balance=lm",
     {"hidden.weight": ((0.0, 0.05),)}),
    ("inspect training/state.py: deployed", {}),
])  # fmt: skip
def test_flags_are_read_off_a_cure(cure, keys):
    assert cures.prescribed(cure) == keys
