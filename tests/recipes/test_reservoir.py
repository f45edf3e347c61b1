"""reservoir: its loss by definition, the scaler, what is fixed, what a run measures, draws, resumes. (Of any recipe: tests/invariants.)"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import reservoir as config_file
from jaxdistill import UserError
from jaxdistill.data import sequences
from jaxdistill.evaluators import classification
from jaxdistill.models import readout as models
from jaxdistill.models import reservoir as reservoirs
from jaxdistill.models.kaf import KAFConfig
from jaxdistill.recipe import Dials
from jaxdistill.recipes.reservoir import PlateauConfig, plateau
from jaxdistill.training import loop, optim, plan, prepare, sharding
from jaxdistill.training.defaults import defaults
from tests.training.test_loop import interrupt

DATA = dict(source="actions", classes=4, subjects=6, takes=1, length=10, test=0.2, validation=0.2)
READOUT = dict(kernels=(3,), filters=4, pooling=4, hidden=8, pieces=2, width=6)


def config(**changes) -> ConfigDict:
    """A job of one run, `kaf`. changes: of sections (dicts), or of keys."""
    c = defaults()
    c.mesh, c.monitor, c.minimize = (1, 1, 1), "validation/nll", True
    c.data, c.readout = ConfigDict(DATA), ConfigDict(READOUT)
    c.reservoir = ConfigDict(dict(units=8, density=0.5, input_scale=0.1))
    c.train.update(dict(steps=4, batch=8, lr=1e-2, eval_every=2, checkpoint_every=2))
    c.runs, c.run = ("kaf",), ConfigDict(dict(kaf=dict(recipe="reservoir")))
    for name, change in changes.items():
        c[name] = ConfigDict(c.get(name, ConfigDict()).to_dict() | change) if isinstance(change, dict) else change
    return c


def built(**changes):
    return prepare.build(plan.expand(config(**changes))[0]).recipe


def ready(**changes) -> prepare.Prepared:
    return prepare.prepare(prepare.build(plan.expand(config(**changes))[0]), sharding.make_mesh((1, 1, 1)))


def table(tmp_path, **arrays) -> dict:
    """Changes for an .npz of 3 classes x 8 examples of 5 frames x 3 channels, of which channel 1 is always 7."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 8)
    x = rng.normal(size=(24, 5, 3)) * [1, 1, 50] + y[:, None, None]
    x[..., 1] = 7
    np.savez(tmp_path / "set.npz", **(dict(x=x.astype(np.float32), y=y) | arrays))
    return dict(data=ConfigDict(dict(source="npz", path=str(tmp_path / "set.npz"), split="stratified", test=0.25, validation=0.25)))


# A job, with everything that is fitted before the first update
FITTED = dict(readout=READOUT | dict(statistics=("mean", "step", "min"), standardise=True))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(workdir, row)"""
    workdir = tmp_path_factory.mktemp("reservoir") / "job"
    return workdir, loop.run(config(**FITTED), workdir, quiet=True)["rows"][0]


def test_a_run_measures_what_it_predicts(job):
    """Of the test split, from its last checkpoint, by the functions of arrays alone."""
    workdir, row = job
    one = ready(**FITTED)
    checkpoints = loop.Checkpoints(workdir / "runs/kaf-0/checkpoints", minimize=True)
    state, _ = checkpoints.load(4, one.abstract)
    checkpoints.close()
    found = built(**FITTED).evaluators["test"]
    test = sequences.load(sequences.SequenceConfig(**DATA)).splits["test"]
    batch = jax.device_put(test.take(np.arange(len(test))) | {"valid": np.ones(len(test), bool)})
    arrays = jax.device_get(found.measure(state.params, prepare.Variables(state.params, state.extra), one.frozen, batch))
    assert set(arrays) == {"logits", "label", "valid", "group", "beyond"}
    np.testing.assert_array_equal(arrays["group"], test.subjects)
    wanted = classification.finish_logits({name: arrays[name][None] for name in ("logits", "label", "valid", "group")})
    assert {name: row[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
    assert row["beyond"] == pytest.approx(arrays["beyond"].mean(), abs=1e-6)
    assert {"accuracy", "balanced_accuracy", "macro_precision", "macro_recall", "macro_f1", "nll", "ece15"} <= set(row)


def test_the_figures_are_drawn(job):
    folder = job[0] / "runs/kaf-0/figures"
    assert {path.name for path in folder.iterdir()} == {"confusion.png", "shapes.png", "memory.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


def test_a_resumed_run_is_the_same_to_the_bit(job, tmp_path, monkeypatch):
    workdir, row = job
    with monkeypatch.context() as patch:
        interrupt(patch, at=2)
        with pytest.raises(loop.Interrupted):
            loop.run(config(**FITTED), tmp_path, quiet=True)
    again = loop.run(config(**FITTED), tmp_path, quiet=True)["rows"][0]
    assert again | {"seconds": 0} == row | {"seconds": 0}
    assert (tmp_path / "runs/kaf-0/metrics.jsonl").read_bytes() == (workdir / "runs/kaf-0/metrics.jsonl").read_bytes()


# What is fixed, what is fitted


@pytest.fixture(scope="module")
def one():
    return ready()


def test_a_fixed_reservoir_is_a_constant_of_the_step(one):
    """In no parameter, moment or checkpoint; the same from the same seed, another from another."""
    assert set(one.state.params) == {"representation", "readout"}
    assert {name: x.shape for name, x in one.frozen["reservoir"].items()} == {"w_in": (2, 75, 8), "w": (2, 8, 8), "bias": (2, 8)}
    again, other = (built(seeds=(seed,)).frozen(None)["reservoir"]["w"] for seed in (0, 1))
    np.testing.assert_array_equal(again, one.frozen["reservoir"]["w"])
    assert not np.array_equal(other, again)


def test_a_trained_reservoir_trains_and_only_matrices_decay():
    recipe = built(reservoir=dict(units=8, density=0.5, trained=True), kaf=dict(lr_mult=3.0, gamma="trained"))
    params = jax.eval_shape(recipe.init, jax.random.key(0)).params
    assert set(params["reservoir"]) == {"w_in", "w", "bias", "leak"}
    groups = optim.group_tree(params, recipe.optim_rules)
    decayed = {optim.path_name(path) for path, group in jax.tree.leaves_with_path(groups) if group.weight_decay}
    assert decayed == {f"{path}/kernel" for path in ("representation/conv_3", "representation/attention", "representation/score",
                                                     "readout/maxout/linear", "readout/linear", "readout/out")}  # fmt: skip
    fast = {optim.path_name(path) for path, group in jax.tree.leaves_with_path(groups) if group.lr_mult == 3}
    assert fast == {"readout/kaf/alpha", "readout/kaf/rho"}
    assert recipe.frozen(None)["reservoir"]["wired"].dtype == bool


def test_the_scaler_is_fitted_on_the_frames_that_train(tmp_path, caplog):
    """Not on padding, validation or test; a constant channel is named, centred and not scaled."""
    lengths = 1 + np.arange(24) % 5
    changes = table(tmp_path, length=lengths)
    recipe = built(**changes)
    train = sequences.load(sequences.SequenceConfig(**changes["data"].to_dict())).splits["train"]
    everything = train.take(np.arange(len(train)))
    frames = np.concatenate([x[:length].astype(np.float64) for x, length in zip(everything["x"], everything["length"], strict=True)])
    with caplog.at_level(logging.WARNING):
        variables = recipe.calibrate(prepare.Variables({}, {}), {}, None)
    mean, std = (np.asarray(variables.extra[name]) for name in ("mean", "std"))
    np.testing.assert_allclose(mean, frames.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, np.where([True, False, True], frames.std(0), 1), rtol=1e-5)
    assert "channels 1 of 3 are constant" in caplog.text
    assert len(frames) < everything["x"].shape[0] * everything["x"].shape[1]


def test_statistics_are_standardised_on_what_trains(tmp_path):
    """Each by its mean and deviation over the training split, of what the fixed reservoir makes of the scaled frames."""
    chosen = READOUT | dict(standardise=True, norm=False, parts=("statistics",))
    changes = table(tmp_path, length=1 + np.arange(24) % 5) | dict(readout=chosen)
    one = ready(**changes)
    recipe, frozen = one.built.recipe, one.frozen
    variables = recipe.calibrate(prepare.Variables(one.state.params, one.state.extra), frozen, None)
    split = sequences.load(sequences.SequenceConfig(**changes["data"].to_dict())).splits["train"]
    batch = split.take(np.arange(len(split)))
    where = np.arange(5)[None] < batch["length"][:, None]
    scaled = (batch["x"] - np.asarray(variables.extra["mean"])) / np.asarray(variables.extra["std"])
    inputs = jnp.where(where[..., None], scaled, 0)
    states = np.concatenate(list(reservoirs.run(frozen["reservoir"], jnp.full(2, 0.3), inputs, jnp.asarray(where))), axis=-1)
    rows = [one[:length] for one, length in zip(states.astype(np.float64), batch["length"], strict=True)]
    vectors = np.stack([np.concatenate([x.mean(0), x.max(0), x.std(0)]) for x in rows])
    found = {name: np.asarray(value) for name, value in variables.extra["statistics"].items()}
    np.testing.assert_allclose(found["mean"], vectors.mean(0), atol=1e-5)
    np.testing.assert_allclose(found["std"], vectors.std(0), atol=1e-5)
    measured = jax.jit(recipe.evaluators["test"].measure)(
        one.state.params, variables, frozen, jax.device_put(batch | {"valid": np.ones(len(split), bool)}))
    readout = models.Readout(models.ReadoutConfig(**chosen), KAFConfig(), 3)
    wanted = (vectors - vectors.mean(0)) / vectors.std(0)
    logits, _ = jax.jit(readout.apply)({"params": one.state.params["readout"]}, wanted.astype(np.float32))
    np.testing.assert_allclose(measured["logits"], logits, atol=1e-3)


def test_inputs_are_scaled(one):
    """What is measured does not depend on the unit of the inputs once the scaler is fitted to it."""
    recipe = one.built.recipe
    batch = dict(next(recipe.data("train", 0)))
    measure = jax.jit(recipe.evaluators["test"].measure)
    params, frozen = one.state.params, one.frozen
    mean, std = np.float32(2) * np.ones(75, np.float32), np.float32(3) * np.ones(75, np.float32)
    plain, scaled = (measure(params, prepare.Variables(params, {"mean": jnp.asarray(m), "std": jnp.asarray(s)}), frozen, batch | {"x": x})
                     for m, s, x in ((0 * mean, std / std, batch["x"]), (mean, std, 3 * batch["x"] + 2)))
    np.testing.assert_allclose(scaled["logits"], plain["logits"], atol=1e-3)


def test_an_evaluation_draws_nothing():
    """Dropout is of training: the same example, wherever it stands in the batch, is measured as the same."""
    recipe = ready().built.recipe
    variables = recipe.init(jax.random.key(0))
    batch = jax.device_put(next(recipe.data("train", 0)))
    same = {name: jnp.broadcast_to(value[:1], value.shape) for name, value in batch.items()}
    logits = jax.jit(recipe.evaluators["validation"].measure)(variables.params, variables, recipe.frozen(None), same)["logits"]
    np.testing.assert_allclose(logits, jnp.broadcast_to(logits[:1], logits.shape), atol=1e-6)


# The loss


def losses(one, batch, params=None):
    """The raw value of each term, without dropout (the same network as evaluation's), and the logits."""
    recipe, s, batch = one.built.recipe, one.state, jax.device_put(batch)
    params = s.params if params is None else params

    def values(params):
        _, aux = recipe.loss(params, s.extra, one.frozen, batch, Dials({"loss": 1.0, "alpha": 1.0}, {}, True), jax.random.key(0))
        whole, _ = recipe.whole(params, s.extra, aux.stats, {})
        measured = recipe.evaluators["test"].measure(params, prepare.Variables(params, s.extra), one.frozen, batch)
        return {name: term.sum / term.count for name, term in (aux.terms | whole).items()}, measured["logits"], aux.probes

    return jax.device_get(jax.jit(values)(params))


def test_the_loss_is_its_definition(tmp_path):
    """Focal loss of smoothed labels, class weights from training counts, logits adjusted by training frequencies; evaluation has none."""
    changes = table(tmp_path) | dict(
        readout=READOUT | dict(dropout=(0.0, 0.0)), loss=dict(smoothing=0.1, gamma=2.0, weights="inverse", tau=1.0)
    )
    changes["data"]["imbalance"] = 2.0
    one = ready(**changes)
    train = sequences.load(sequences.SequenceConfig(**changes["data"].to_dict())).splits["train"]
    batch = train.take(np.arange(8)) | {"valid": np.arange(8) != 5}
    found, logits, probes = losses(one, batch)
    counts = np.bincount(train.labels, minlength=3)
    assert len(set(counts)) > 1
    weights = (1 / counts) * counts.sum() / 3
    z = logits.astype(np.float64) + np.log(counts / counts.sum())
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    target = 0.9 * np.eye(3)[batch["label"]] + 0.1 / 3
    each = np.sum(weights * target * (1 - p) ** 2 * -np.log(p), axis=1)
    assert found["loss"] == pytest.approx(each[batch["valid"]].mean(), rel=1e-4)
    right = (logits.argmax(1) == batch["label"])[batch["valid"]]
    assert (probes["correct"][0], probes["correct"][1]) == (right.sum(), 7)
    assert 0 <= probes["beyond"][0] <= 7


def test_the_penalty_is_of_what_was_learned(one):
    """0 where coefficients are what they began as, however large a fit makes them; of random ones their squares."""
    batch = dict(next(one.built.recipe.data("train", 0)))
    params = one.state.params
    assert losses(one, batch)[0]["alpha"] == 0
    kaf = params["readout"]["kaf"]
    moved = params | {"readout": params["readout"] | {"kaf": {"alpha": kaf["alpha"] + 0.5}}}
    assert losses(one, batch, moved)[0]["alpha"] == pytest.approx(20 * 6 * 0.25, rel=1e-4)
    recipe = built(kaf=dict(init="random"))
    params = recipe.init(jax.random.key(0)).params
    squares = float(np.sum(params["readout"]["kaf"]["alpha"] ** 2))
    assert recipe.whole(params, {}, {}, {})[0]["alpha"].sum == pytest.approx(squares, rel=1e-5)
    assert set(built(readout=READOUT | dict(activation="relu")).weights) == {"loss"}
    assert set(built(kaf=dict(penalty=0.0)).weights) == {"loss"}


def test_a_plateau_lowers_the_rate():
    reaction = plateau(PlateauConfig(patience=2, factor=0.5, least=0.2))
    memory, shares = reaction.memory, []
    for nll in (2.0, 1.0, 1.5, 1.5, 0.9, 0.95, np.nan, 1.0, 1.0, 1.0, 1.0):
        memory, controls, stop = reaction.react(memory, 0, {"validation/nll": nll})
        shares.append(controls["lr"])
        assert stop is None
    assert shares == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2, 0.2]
    assert reaction.memory == {"best": None, "waited": 0, "share": 1.0}
    recipe = built(plateau=dict(patience=2))
    assert recipe.controls == {"lr": 1.0}
    assert recipe.react is not None


# Configs


def test_features_of_one_frame(tmp_path):
    """A table is sequences of length 1, in which attention has nothing to choose from."""
    rng = np.random.default_rng(0)
    rows = [["id", "species", "a", "b"]] + [[str(i), f"s{i % 3}", *map(str, rng.normal(size=2) + i % 3)] for i in range(30)]
    (tmp_path / "leaves.csv").write_text("\n".join(",".join(row) for row in rows))
    data = ConfigDict(dict(source="csv", path=str(tmp_path / "leaves.csv"), label="species", ignore=("id",), validation=0.2))
    recipe = built(data=data, readout=READOUT | dict(parts=("statistics", "convolution")))
    with pytest.raises(UserError, match="readout.parts: found .* for sequences of one frame; accepted: parts without 'attention'"):
        built(data=data)
    variables = jax.eval_shape(recipe.init, jax.random.key(0))
    batch = jax.device_put(next(recipe.data("train", 0)))
    assert (batch["x"].shape, batch["length"].tolist()) == ((8, 1, 2), [1] * 8)
    found = jax.eval_shape(recipe.evaluators["validation"].measure, variables.params, variables, recipe.frozen(None), batch)
    assert found["logits"].shape == (8, 3)
    assert "group" not in found


def small(c: ConfigDict, **more) -> ConfigDict:
    with c.unlocked(), c.ignore_type():
        c.update_from_flattened_dict({"mesh": (1, 1, 1), "reservoir.units": 8, "reservoir.density": 0.5} | more)
    return c


def test_the_config_builds(tmp_path):
    """Every run of it, and every key is one that a run reads."""
    c = small(config_file.get_config(), **{f"data.{key}": value for key, value in DATA.items()})
    assert {one.run.name for one in loop.check(c, tmp_path)} == {"constant", "one_nn", "logistic", "kaf", "relu"}
    assert c.runs[:3] == ("constant", "one_nn", "logistic")
    with pytest.raises(ValueError, match="found variant 'esc'; accepted: seeds, leaf, esc50, omniglot"):
        config_file.get_config("esc")


@pytest.mark.parametrize("variant", ["leaf", "esc50", "omniglot"])
def test_a_variant_builds(variant, tmp_path):
    rng = np.random.default_rng(0)
    if variant == "leaf":
        path, names = tmp_path / "train.csv", [f"margin{i}" for i in range(4)]
        lines = [["id", "species", *names]] + [[str(i), f"s{i // 10}", *map(str, rng.normal(size=4))] for i in range(600)]
        path.write_text("\n".join(",".join(line) for line in lines))
    else:
        y = np.repeat(np.arange(50), 20)
        arrays = dict(x=rng.integers(0, 255, (1000, 6, 5), np.uint8), y=y, drawer=1 + np.tile(np.arange(20), 50), clip=np.arange(1000))
        path = tmp_path / "set.npz"
        np.savez(path, **arrays)
    if variant == "esc50":
        path = tmp_path / "parts"
        path.mkdir()
        for part, rows in (("train", slice(None, None, 2)), ("test", slice(1, None, 2))):
            np.savez(path / f"{part}.npz", **{name: value[rows] for name, value in arrays.items()})
    facts = loop.check(small(config_file.get_config(variant), **{"data.path": str(path)}), tmp_path)[-1].recipe.facts
    assert (facts["classes"], facts["frames"], facts["width"]) == {"leaf": (50, 1, 4)}.get(variant, (50, 5, 6))
    count = {"leaf": 250, "esc50": 500, "omniglot": 500}[variant]
    assert {part: facts["splits"][part]["sequences"] for part in facts["splits"]} == {"train": count, "test": count}


@pytest.mark.parametrize(("changes", "said"), [
    (dict(kaf=dict(penalty=-1.0)), "config key kaf.penalty: found -1.0; accepted: 0 or more"),
    (dict(kaf=dict(lr_mult=-1.0)), "config key kaf.lr_mult: found -1.0; accepted: 0 or more"),
    (dict(loss=dict(smoothing=1.0)), "config key loss.smoothing: found 1.0; accepted: 0 or more, and below 1"),
    (dict(loss=dict(gamma=-1.0)), "config key loss.gamma: found -1.0; accepted: 0 or more"),
    (dict(loss=dict(weights="balanced")), "config key loss.weights: found 'balanced'; accepted: none, inverse, effective"),
    (dict(plateau=dict(patience=-1)), "config key plateau.patience: found -1; accepted: 0 (never) or more"),
    (dict(plateau=dict(factor=1.0)), "config key plateau.factor: found 1.0; accepted: a share, above 0 and below 1"),
    (dict(plateau=dict(patience=2), data=DATA | dict(validation=0.0)),
     "config key plateau.patience: found 2 without a validation split; accepted: 0"),
    (dict(readout=READOUT | dict(activation="tanh")), "config key readout.activation: found 'tanh'; accepted: kaf, kaf2d, relu, elu, gelu"),
    (dict(readout=READOUT | dict(standardise=True), reservoir=dict(fusion="convex")),
     ("config key readout.standardise: found True with reservoir.trained False, reservoir.fusion 'convex'; accepted: False, or states "
      "that do not train (False, 'concat')")),
    (dict(reservoir=dict(leak=(2.0, 1.0))),
     "config key reservoir.leak: found (2.0, 1.0); accepted: (forward, backward), each above 0 and at most 1"),
])  # fmt: skip
def test_a_config_that_is_refused(changes, said):
    with pytest.raises(UserError) as stop:
        built(**changes)
    assert str(stop.value) == said


def test_a_beta_without_weights_that_use_it_is_an_error(tmp_path):
    said = r"config key loss.beta: found 0.9; accepted: 0.999 with loss.weights 'none', which does not use it \('effective' does\)"
    with pytest.raises(UserError, match=said):
        loop.check(config(loss=dict(beta=0.9)), tmp_path)


def test_a_kaf_section_without_a_kaf_is_an_error(tmp_path):
    c = config(kaf=dict(gamma="trained"), readout=READOUT | dict(activation="relu"))
    with pytest.raises(UserError, match="config key kaf.gamma: nothing reads it"):
        loop.check(c, tmp_path)
