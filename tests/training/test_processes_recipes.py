"""Two processes of four devices are one process of eight, too, in what the recipes read for themselves: images with partners and in
identities, and text in two tokenizations. (How processes meet and part: test_processes.py.)"""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdistill.training import loop
from tests.recipes.conftest import job, other  # noqa: F401  (fixtures)
from tests.training import twin_config
from tests.training.test_processes import finish, on, start


@pytest.mark.parametrize("name", ["dcal", "cross"])
def test_two_are_one(name, request, tmp_path):
    variant = name
    if name == "cross":
        variant = f"cross@{request.getfixturevalue('other').parent}"
    twins = start(tmp_path / "two", "nothing", "nothing", variant=f":{variant}")
    config = on(twin_config.get_config(variant), (4, 2, 1), tmp_path)
    alone = loop.run(config, tmp_path / "one", quiet=True)["rows"]
    (code, out, error), second = finish(twins)
    assert (code, error) == (0, "")
    assert second == (0, "", "")  # the first alone speaks
    together = json.loads((tmp_path / "two/results.json").read_text())["rows"]
    for run, one, two in zip(config.runs, alone, together, strict=True):
        assert len(re.findall(rf"^{run}-0 +4/4  validation", out, re.MULTILINE)) == 1
        assert numbers(two) == pytest.approx(numbers(one), rel=1e-5)
        same_lines(*(tmp_path / side / f"runs/{run}-0/metrics.jsonl" for side in ("two", "one")))
        found, wanted = (load_file(tmp_path / side / f"runs/{run}-0/export/model.safetensors") for side in ("two", "one"))
        assert found.keys() == wanted.keys()
        for tensor in wanted:
            np.testing.assert_allclose(found[tensor], wanted[tensor], atol=1e-5, err_msg=tensor)


def numbers(row: dict) -> dict:
    return {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "seconds"}


def same_lines(*files) -> None:
    """Each update once, of as many examples, tokens or spans, and with the same losses."""
    two, one = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for a, b in zip(two, one, strict=True):
        assert a.keys() == b.keys()
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            for term, told in b["terms"].items():
                assert a["terms"][term]["count"] == told["count"], term
                assert a["terms"][term]["raw"] == pytest.approx(told["raw"], rel=1e-5, abs=1e-7), term
        if "evaluation" in a:
            assert a["evaluation"] == pytest.approx(b["evaluation"], rel=1e-5)
