"""Bad inputs of jobs on label distributions, as tests/test_bad_inputs.py has them for text: one line that names the key or file, exit
code 2, and the workdir stays free for the corrected config."""

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

import jaxdistill
from configs import soft_label
from jaxdistill.data import distributions
from jaxdistill.training import loop
from tests.test_bad_inputs import one_line

SMALL = {"mesh": (1, 1, 1), "runs": ("graph",), "data.cities": 1, "data.addresses": 4, "data.neighbours": 3, "train.steps": 2,
         "train.batch": 8, "train.eval_every": 1, "train.checkpoint_every": 1}  # fmt: skip
CITIES = ("cities", "addresses", "neighbours", "withheld", "surveyed")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Tables, votes and a .mat, most of them spoilt in one way."""
    import pyarrow
    import pyarrow.parquet
    import scipy.io

    root, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    x, target, votes = rng.normal(size=(40, 3)), rng.dirichlet(np.ones(4), 40), rng.integers(0, 9, (40, 4))
    put = lambda array, at, value: np.where(np.arange(array.size).reshape(array.shape) == at, value, array)  # noqa: E731
    group, split = np.arange(40) // 4, np.asarray(["train"] * 30 + ["test"] * 10)
    for name, arrays in {
        "good": dict(x=x, target=target), "unnamed": dict(features=x, target=target), "nan": dict(x=put(x, 7, np.nan), target=target),
        "inf": dict(x=put(x, 8, np.inf), target=target), "sum": dict(x=x, target=put(target, 9, 0.0)),
        "counts": dict(x=x, target=votes + 1.0),
        "negative": dict(x=x, target=put(target, 5, -0.2)), "lost": dict(x=x, target=put(target, 6, np.nan)),
        "short": dict(x=x, target=target[:9]), "flat": dict(x=x, target=target[:, 0]), "one": dict(x=x, target=np.ones((40, 1))),
        "constant": dict(x=np.ones((40, 3)), target=target), "leak": dict(x=x, target=target, group=group, split=split),
        "named": dict(x=x, target=target, split=np.asarray(["train"] * 39 + ["dev"])),
        "single": dict(x=x, target=target, group=np.zeros(40)),
        "three": dict(x=x, target=target, split=np.asarray(["train"] * 20 + ["validation"] * 10 + ["test"] * 10)),
        "train_only": dict(x=x, target=target, split=np.asarray(["train"] * 40)),
        "text": dict(x=np.asarray([["a"] * 3] * 40), target=target), "scalar": dict(x=x, target=target, group=np.float64(3)),
        "minus": dict(x=x, votes=put(votes, 3, -1)), "half": dict(x=x, votes=put(votes, 3, 0.5)), "none": dict(x=x, votes=0 * votes),
    }.items():  # fmt: skip
        np.savez(root / f"{name}.npz", **arrays)
    (root / "broken.npz").write_text("no zip")
    (root / "void.npz").write_bytes(b"")
    with open(root / "single_array.npz", "wb") as file:
        np.save(file, x)
    scipy.io.savemat(root / "damaged.mat", {"features": x, "labels": target}, do_compression=True)
    raw = bytearray((root / "damaged.mat").read_bytes())
    raw[200:1200:7] = bytes(byte ^ 0x3C for byte in raw[200:1200:7])
    (root / "damaged.mat").write_bytes(raw)
    (root / "broken.parquet").write_text("no table")
    (root / "broken.mat").write_text("no matrix")
    scipy.io.savemat(root / "other.mat", {"features": x, "scores": target})
    columns = {"a": x[:, 0], "b": x[:, 1], "note": ["some text"] * 40} | {f"t{i}": target[:, i] for i in range(4)}
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "table.parquet")
    header, row = ["a", "yes", "no"], [1, 2, 3]
    for name, rows in {"votes": [row] * 9, "ragged": [row] * 3 + [[1, 2]], "word": [row] * 3 + [["x", 2, 3]], "empty": []}.items():
        with open(root / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    (root / "twice.csv").write_text("a,yes, a,no\n" + "1,2,3,4\n" * 9)
    return root


def job(files: Path, changes: dict) -> ConfigDict:
    """configs/soft_label.py, made small; `changes` by dotted keys; data.source other than cities has none of their keys."""
    config = soft_label.get_config().to_dict()
    changes = SMALL | changes
    if changes.get("data.source", "cities") != "cities":
        config["data"] = {"validation": 0.1}
        given = {key: x for key, x in changes.items() if key not in ("runs", *(f"data.{name}" for name in CITIES if key in SMALL))}
        changes = given | {"runs": ("mlp",)}
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value.replace("{files}", str(files)) if isinstance(value, str) else value
    config["run"] = {name: config["run"][name] for name in config["runs"]}
    config["model"] = {name: config["model"][name] for name in config["runs"]}
    config["headline"] = config["runs"][0]
    return ConfigDict(config)


def table(name: str, **more) -> dict:
    return {"data.source": "table", "data.path": f"{{files}}/{name}"} | {f"data.{key}": value for key, value in more.items()}


def votes(name: str, **more) -> dict:
    return table(name, **more) | {"data.source": "votes"}


@pytest.mark.parametrize(("change", "said"), [
    # What is read
    pytest.param({"data.source": "csv"}, "config key data.source: found 'csv'; accepted: cities | table | votes | mat", id="source"),
    pytest.param({"data.path": "x"}, "config key data.path: found 'x'; accepted: none with data.source 'cities'", id="path of cities"),
    pytest.param({"data.source": "mat"}, "config key data.path: found ''; accepted: a file with data.source 'mat'", id="no path"),
    pytest.param(table("nowhere.npz"), "nowhere.npz': not found; accepted: a .parquet or .npz file", id="missing file"),
    pytest.param(table("votes.csv"), "votes.csv': no .parquet or .npz file; accepted: one", id="another kind of file"),
    pytest.param(table("broken.npz"), "broken.npz': not a readable .npz file", id="text for arrays"),
    pytest.param(table("broken.parquet", target=("t0",)), "broken.parquet': not a readable .parquet file", id="text for a table"),
    pytest.param(table("broken.mat") | {"data.source": "mat"}, "broken.mat': not a readable .mat file", id="text for matrices"),
    pytest.param(table("void.npz"), "void.npz': not a readable .npz file", id="an empty file for arrays"),
    pytest.param(table("single_array.npz"), "single_array.npz': not a readable .npz file", id="an .npy under another name"),
    pytest.param(table("damaged.mat") | {"data.source": "mat"}, "damaged.mat': not a readable .mat file", id="damaged matrices"),
    pytest.param(table("scalar.npz"), "scalar.npz': group is () beside 40 rows of inputs; accepted: one for each", id="no groups"),
    pytest.param(table("other.mat") | {"data.source": "mat"}, "other.mat': has features, scores, no labels", id="matrices of other names"),
    pytest.param(table("unnamed.npz"), "unnamed.npz': has features, target, no x; accepted: x [rows, inputs]", id="arrays of other names"),
    pytest.param(table("text.npz"), "text.npz': inputs are <U1 (40, 3); accepted: numbers [rows, columns]", id="words for numbers"),
    pytest.param(table("short.npz"), "short.npz': target is (9, 4) beside 40 rows of inputs", id="fewer targets than inputs"),
    pytest.param(table("flat.npz"), "flat.npz': target are float64 (40,); accepted: numbers [rows, columns]",
                 id="labels for distributions"),
    pytest.param(table("table.parquet"), "config key data.target: found (); accepted: columns of data.path", id="no columns named"),
    pytest.param(table("table.parquet", target=("t0", "t9")), "config key data.target: found 't9'; accepted: columns of", id="column"),
    pytest.param(table("table.parquet", target=("t0", "t1", "t2", "t3")), "column 'note' holds 'some text'; accepted: numbers, or data.fea",
                 id="a column of words"),
    pytest.param(table("table.parquet", target=("t0", "t1", "t2", "t3"), features=("a", "t0")),
                 "config key data.features: found 't0', which is no input", id="target among the inputs"),
    pytest.param(table("good.npz", target=("t0",)), "config key data.target: found ('t0',) with an .npz", id="columns of arrays"),
    pytest.param(table("good.npz", group="place"), "config key data.group: found 'place'; accepted: columns of", id="no such group"),
    # What is in it
    pytest.param(table("nan.npz"), "nan.npz': row 2 has nan in 'column 1' (1 such numbers); accepted: finite", id="NaN"),
    pytest.param(table("inf.npz"), "inf.npz': row 2 has inf in 'column 2'", id="infinite"),
    pytest.param(table("sum.npz"), "sum.npz': row 2 sums to 0.", id="not a distribution"),
    pytest.param(table("counts.npz"), "(40 such of 40); accepted: rows that sum to 1 within data.tolerance 0.001 (counts are",
                 id="counts for a distribution"),
    pytest.param(table("negative.npz"), "negative.npz': row 1 gives '1' the probability -0.2; accepted: probabilities, from 0 on",
                 id="negative"),
    pytest.param(table("lost.npz"), "lost.npz': row 1 gives '2' the probability nan; accepted: finite numbers", id="NaN target"),
    pytest.param(table("one.npz"), "one.npz': 1 class; accepted: two or more", id="one class"),
    pytest.param(table("constant.npz"), "constant.npz': every column of inputs is constant in the training split", id="nothing varies"),
    # Votes
    pytest.param(votes("minus.npz"), "minus.npz': row 0 has -1 votes for '3'; accepted: whole numbers from 0 on", id="negative votes"),
    pytest.param(votes("half.npz"), "half.npz': row 0 has 0.5 votes for '3'", id="half a vote"),
    pytest.param(votes("none.npz"), "none.npz': none of 40 rows has votes for a class", id="no votes"),
    pytest.param(votes("votes.csv"), "config key data.target: found (); accepted: columns of data.path", id="no columns of votes"),
    pytest.param(votes("ragged.csv", target=("yes", "no")), "ragged.csv': line 5 has 2 fields, the first 3", id="ragged lines"),
    pytest.param(votes("word.csv", target=("yes", "no")), "word.csv': column 'a' holds 'x'; accepted: numbers", id="word among numbers"),
    pytest.param(votes("twice.csv", target=("yes", "no")), "twice.csv': column 'a' is there twice; accepted: each name once",
                 id="a column twice"),
    pytest.param(votes("empty.csv", target=("yes", "no")), "empty.csv': 1 lines; accepted: a line of names and one for each",
                 id="no lines"),
    pytest.param(votes("votes.csv", target=("yes", "no"), reject=("NF",)), "config key data.reject: found 'NF'", id="nothing to reject"),
    pytest.param(votes("votes.csv", target=("yes", "no"), inputs="{files}/ragged.csv"), "ragged.csv': line 5 has 2 fields", id="inputs"),
    pytest.param(votes("votes.csv", target=("yes", "no"), inputs="{files}/empty.csv"), "empty.csv': 1 lines", id="no inputs"),
    pytest.param(votes("minus.npz", reject=("NF",)), "config key data.reject: found ('NF',) with an .npz", id="reject of arrays"),
    # Splits
    pytest.param(table("leak.npz"), "leak.npz': group '7' is in train and in test; accepted: each group in one split", id="leak"),
    pytest.param(table("named.npz"), "named.npz': split 'dev'; accepted: train, training", id="split of another name"),
    pytest.param(table("train_only.npz"), "train_only.npz': too few test rows (train 36, validation 4, test 0)", id="no test"),
    pytest.param(table("single.npz"), "single.npz': too few test rows", id="one group"),
    pytest.param(table("leak.npz", folds=3), "config key data.folds: found 3; accepted: 0 with data.path", id="folds of what is split"),
    pytest.param(table("good.npz", folds=50), "config key data.folds: found 50; accepted: at most 40, the groups (or rows)",
                 id="many folds"),
    pytest.param(table("good.npz", folds=3, fold=3), "config key data.fold: found 3; accepted: -1 to 2", id="beyond the folds"),
    pytest.param(table("good.npz", fold=-1), "config key data.fold: found -1; accepted: 0 or more without data.folds", id="no folds"),
    pytest.param(table("good.npz", validation=1.0), "config key data.validation: found 1.0; accepted: 0 to 0.9", id="all validates"),
    pytest.param(table("good.npz", validation=0.25, validation_fold=4), "config key data.validation_fold: found 4; accepted: 0 to 3",
                 id="beyond the shares of validation"),
    pytest.param(table("three.npz", validation_fold=1), "config key data.validation_fold: found 1; accepted: 0 with data.path",
                 id="shares of a validation that is given"),
    # Keys without effect
    pytest.param(table("good.npz", validation=0.0, validation_fold=1), "config key data.validation_fold: found 1; accepted: 0 to 0",
                 id="no validation"),
    pytest.param({"data.drop_single": True}, "config key data.drop_single: found True; accepted: False with data.source 'cities'",
                 id="votes"),
    pytest.param(table("good.npz", jitter=5.0), "config key data.jitter: found 5.0; accepted: 20.0 with data.source 'table'", id="jitter"),
    pytest.param({"data.neighbours": 0}, "config key data.neighbours: found 0; accepted: 1 to 512", id="no neighbours"),
    pytest.param({"data.neighbours": 2.5}, "config key data.neighbours: found 2.5 (float); accepted: int", id="half a neighbour"),
    # Models
    pytest.param(table("good.npz") | {"run.mlp.model.kind": "graph"},
                 "config key run.mlp.model.kind: found 'graph'; accepted: mlp, as the data are no graphs", id="a graph model of a table"),
    pytest.param({"run.graph.model.kind": "cnn"}, "config key run.graph.model.kind: found 'cnn'; accepted: mlp | graph",
                 id="unknown model"),
    pytest.param({"model.graph.heads": 5}, "config key model.graph.heads: found 5; accepted: a divisor of width (64)", id="heads"),
    pytest.param({"model.graph.hidden": (8,)}, "config key model.graph.hidden: found in model.graph, which has no such key",
                 id="key of another"),
    # Options
    pytest.param({"soft.smoothing": 1.0}, "config key soft.smoothing: found 1.0; accepted: 0 or more, and below 1", id="all smoothed"),
    pytest.param({"soft.temperature": 0.0}, "config key soft.temperature: found 0.0; accepted: more than 0", id="temperature of 0"),
    pytest.param({"soft.entropy_kind": "cubic"}, "config key soft.entropy_kind: found 'cubic'; accepted: linear, quadratic", id="kind"),
    pytest.param({"soft.entropy_floor": 1.0}, "soft.entropy_floor: found 1.0; accepted: 0.0 with soft.entropy_weight 0.0, which",
                 id="unused"),
    pytest.param({"soft.entropy_weight": 1.0}, "soft.entropy_weight: found 1.0; accepted: 0, or a soft.entropy_floor above 0",
                 id="no floor"),
    pytest.param({"soft.margin": 2.0}, "config key soft.margin: found 2.0; accepted: 0.0 with soft.margin_weight 0.0", id="unused margin"),
    pytest.param({"soft.class_weights": "inverse", "soft.beta": 0.9}, "config key soft.beta: found 0.9; accepted: 0.999", id="unused beta"),
    pytest.param({"soft.mixup": 0.2}, "config key soft.mixup: found 0.2; accepted: 0 with model.kind 'graph'", id="a mean of graphs"),
    pytest.param({"soft.logit_norm": 0.1, "soft.norm_cap": 9.0}, "config key soft.logit_norm: found 0.1; accepted: 0 with a norm_cap",
                 id="two"),
    # Guards
    pytest.param({"soft.entropy_weight": 5.0, "soft.entropy_floor": 2.0}, "config key soft.entropy_floor: found 2, above ", id="floor"),
    pytest.param({"soft.norm_cap": 1.0, "soft.temperature": 4.0}, "config key soft.norm_cap: found 1 at soft.temperature 4, with which no "
                 "probability can be above 0.157, where 1 % of the training targets have 0.", id="norm cap"),
    pytest.param({"soft.logit_norm": 1.0}, "config key soft.logit_norm: found 1, with which no probability can be above 0.294",
                 id="LogitNorm"),
])  # fmt: skip
def test_a_config(change, said, files, tmp_path, capsys):
    """Refused before anything trains, in a folder that stays free for the corrected config."""
    with pytest.raises(SystemExit) as stop:
        jaxdistill.command(lambda: loop.run(job(files, change), tmp_path / "w", quiet=True))
    assert said in one_line(stop.value.code, capsys.readouterr().err)
    assert not (tmp_path / "w").exists() or not list((tmp_path / "w").iterdir())


def test_a_table_without_pyarrow(files, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else found(name))
    with pytest.raises(jaxdistill.UserError, match=r"table.parquet': a .parquet file without pyarrow; accepted: pip install pyarrow"):
        distributions.load(distributions.DistributionConfig(source="table", path=str(files / "table.parquet"), target=("t0",)))


def test_pixels_of_different_lengths(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["pixels", "yes", "no"], ["1 2 3", 1, 2], ["1 2", 3, 4]])
    with pytest.raises(jaxdistill.UserError, match="column pixels holds rows of different lengths"):
        distributions.load(distributions.DistributionConfig(source="votes", path=str(tmp_path / "a.csv"), target=("yes", "no")))


def test_rows_without_a_group(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.eye(4), target=np.eye(4), group=np.asarray(["a", "b", "", "c"]))
    with pytest.raises(jaxdistill.UserError, match="row 2 has no group"):
        distributions.load(distributions.DistributionConfig(source="table", path=str(tmp_path / "a.npz")))
