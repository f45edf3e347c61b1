"""soft_label: what it trains, what it deploys, what it says of itself, what it refuses. (What holds of any recipe: tests/invariants.)"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import soft_label as config_file
from jaxdistill import UserError
from jaxdistill.data import distributions
from jaxdistill.evaluators import distribution
from jaxdistill.losses import regularisation
from jaxdistill.recipe import Dials, Variables
from jaxdistill.recipes.soft_options import SoftConfig
from jaxdistill.training import loop, optim, plan, prepare, sharding
from jaxdistill.training.defaults import defaults
from tests.invariants.checks import QUICK

DATA = dict(cities=2, addresses=6, neighbours=4, validation=0.2)
MODELS = dict(mlp=dict(hidden=(8,)), graph=dict(width=8, depth=1, heads=2))


@pytest.fixture(scope="module", autouse=True)
def _forgotten():
    """What is loaded here is of no use to others."""
    yield
    distributions.load.cache_clear()


def config(*runs: str, **changes) -> ConfigDict:
    """A job of a run for each of these kinds of models. changes: of sections (dicts), or of keys."""
    c = defaults()
    c.mesh, c.monitor = (1, 1, 1), "validation/kl"
    c.data, c.soft, c.model = ConfigDict(DATA), ConfigDict(dict(figures=False)), ConfigDict({kind: MODELS[kind] for kind in runs})
    c.train.update(dict(steps=6, batch=16, lr=1e-2, eval_every=3, checkpoint_every=3))
    c.runs, c.run = runs, ConfigDict({kind: dict(recipe="soft_label", model=dict(kind=kind)) for kind in runs})
    for name, change in changes.items():
        c[name] = ConfigDict(c.get(name, ConfigDict()).to_dict() | change) if isinstance(change, dict) else change
    return c


def built(kind: str = "mlp", **changes) -> prepare.Built:
    return prepare.build(plan.expand(config(kind, **changes))[0])


def start(recipe) -> Variables:
    """Calibrated, and not trained."""
    return recipe.calibrate(recipe.init(jax.random.key(0)), {}, iter(()))


def look(recipe, variables, batch, key=0):
    """(total, raw value of each term, probes) at weights of 1."""
    scale = {name: 1 / jnp.float32(batch["valid"].sum()) for name, weight in recipe.weights.items() if not weight.off}

    def see(params, extra, batch):
        total, aux = recipe.loss(params, extra, {}, batch, Dials(scale, {}, True), jax.random.key(key))
        return total, {name: term.sum / term.count for name, term in aux.terms.items()}, aux.probes

    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    return jax.device_get(jax.jit(see, compiler_options=QUICK)(variables.params, variables.extra, arrays))


def deployed(recipe, variables, batch, split="test"):
    """float64 logits as they are measured."""
    measure = jax.jit(recipe.evaluators[split].measure, compiler_options=QUICK)
    return np.asarray(measure(variables.params, variables, {}, batch)["logits"], np.float64)


def first_batch(recipe, split="train") -> dict:
    return dict(next(recipe.data(split, 0)))


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


# -- a job --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(workdir, rows by name) of both models; figures of one."""
    workdir = tmp_path_factory.mktemp("soft") / "job"
    c = config("mlp", "graph")
    c.run.graph.soft = dict(figures=True)
    with pytest.MonkeyPatch.context() as patch:
        told = []
        patch.setattr(logging.getLogger("jaxdistill.recipes.soft_label"), "warning", lambda text, *values: told.append(text % values))
        rows = loop.run(c, workdir, quiet=True)["rows"]
    return workdir, {row["name"]: row for row in rows}, told


def test_a_row_has_what_is_asked_of_label_distributions(job):
    _, rows, _ = job
    for row in rows.values():
        assert {*distribution.MEASURES, "soft_ce", "ece15", "brier", "accuracy", "top2", "top3", "entropy", "spread", "classes_predicted",
                "kl_constant", "kl_gain", "kl_gain_low", "kl_gain_high", "temperature", "kl_calibrated", "ece15_calibrated"} <= row.keys()
        assert row["kl_gain"] == pytest.approx(row["kl_constant"] - row["kl"])
        assert row["kl_gain_low"] <= row["kl_gain"] <= row["kl_gain_high"]
        assert (row["steps"], row["skipped"]) == (6, 0)
        assert "temperature" not in row["validation"]


def test_the_constant_is_of_the_training_split(job):
    sets = distributions.load(distributions.DistributionConfig(**DATA))
    mean = sets.splits["train"].rows["target"].astype(np.float64).mean(0)
    target = sets.splits["test"].rows["target"].astype(np.float64)
    wanted = np.mean(np.sum(target * (np.log(target) - np.log(mean)[None]), axis=1))
    _, rows, _ = job
    assert rows["mlp"]["kl_constant"] == pytest.approx(wanted, rel=1e-6)


def test_the_figures_are_drawn(job):
    workdir, _, _ = job
    for name in ("reliability", "collapse"):
        assert (workdir / f"runs/graph-0/figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (workdir / "runs/mlp-0/figures").exists()


def test_no_better_than_the_constant_is_said(tmp_path, caplog):
    """After an update of nothing; and what is better is not said to be worse."""
    with caplog.at_level(logging.WARNING, logger="jaxdistill.recipes.soft_label"):
        row = loop.run(config("mlp", train=dict(steps=1, lr=0.0, eval_every=1)), tmp_path, quiet=True)["rows"][0]
    assert row["kl_gain_low"] <= 0
    assert f"not better than the best constant prediction: KL smaller by {row['kl_gain']:.4f}" in caplog.text


# -- what is measured ---------------------------------------------------------------------------------------------------------


def test_temperature_is_of_the_validation_rows_and_measured_on_the_others():
    """Against both splits by themselves: only test rows in the measures, only validation rows in the temperature."""
    recipe = built(model=dict(mlp=dict(hidden=()))).recipe
    variables, train = start(recipe), distributions.load(distributions.DistributionConfig(**DATA)).splits["train"].rows
    x = (train["x"] - variables.extra["x"]["mean"][None]) / variables.extra["x"]["std"][None]
    kernel = np.linalg.lstsq(np.asarray(x), np.log(train["target"]), rcond=None)[0]
    variables.params["head"]["kernel"] = jnp.asarray(4 * kernel)  # more sure of itself than it has reason to be
    measure = jax.jit(recipe.evaluators["test"].measure, compiler_options=QUICK)
    seen = [jax.device_get(measure(variables.params, variables, {}, dict(batch))) for batch in recipe.data("test", 0)]
    found = recipe.evaluators["test"].finish({name: np.stack([each[name] for each in seen]) for name in seen[0]})
    splits = distributions.load(distributions.DistributionConfig(**DATA)).splits
    z, target = {}, {}
    for name in ("validation", "test"):
        batch = splits[name].take(np.arange(len(splits[name]))) | {"valid": np.ones(len(splits[name]), bool)}
        z[name], target[name] = deployed(recipe, variables, batch), batch["target"].astype(np.float64)
    kl = lambda name, t: np.mean(np.sum(target[name] * (np.log(target[name]) - log_softmax(z[name] / t)), axis=1))  # noqa: E731
    assert found["kl"] == pytest.approx(kl("test", 1), rel=1e-5)
    t = found["temperature"]
    assert t > 1.3
    assert kl("validation", t) < min(kl("validation", 0.99 * t), kl("validation", 1.01 * t))
    assert found["kl_calibrated"] == pytest.approx(kl("test", t), rel=1e-5)
    assert found["kl_calibrated"] < found["kl"]


def test_without_validation_nothing_is_calibrated():
    recipe = built(data=dict(validation=0.0)).recipe
    assert set(recipe.evaluators) == {"test"}
    variables = start(recipe)
    measure = jax.jit(recipe.evaluators["test"].measure, compiler_options=QUICK)
    seen = jax.device_get(measure(variables.params, variables, {}, first_batch(recipe, "test")))
    found = recipe.evaluators["test"].finish({name: value[None] for name, value in seen.items()})
    assert "kl" in found
    assert "temperature" not in found


def test_inputs_are_standardised_on_the_training_split():
    recipe = built("graph").recipe
    variables = start(recipe)
    train = distributions.load(distributions.DistributionConfig(**DATA)).splits["train"]
    x = train.rows["x"].astype(np.float64)
    np.testing.assert_allclose(variables.extra["x"]["mean"], x.mean(0), rtol=1e-4, atol=1e-5)
    batch = first_batch(recipe)
    moved = batch | {"x": batch["x"] * 3 + 7}
    extra = variables.extra | {"x": {"mean": 3 * variables.extra["x"]["mean"] + 7, "std": 3 * variables.extra["x"]["std"]}}
    a, b = look(recipe, variables, batch), look(recipe, variables._replace(extra=extra), moved)
    assert a[0] == pytest.approx(b[0], rel=1e-4)  # the unit is of no matter
    raw = built("graph", soft=dict(standardise=False)).recipe
    assert raw.calibrate is None


# -- what is trained ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_divergence():
    """By definition in float64, of each option that replaces or bounds it."""
    batch = first_batch(built().recipe)
    batch["valid"][3:5] = False
    valid, target = batch["valid"], batch["target"].astype(np.float64)
    plain = built().recipe
    variables = start(plain)
    z = deployed(plain, variables, batch)

    def kl(t, z):
        return np.sum(t * (np.log(t) - log_softmax(z)), axis=1)

    def raw(**soft):
        return {name: float(value) for name, value in look(built(soft=soft).recipe, variables, batch)[1].items()}

    assert raw() == {"kl": pytest.approx(kl(target, z)[valid].mean(), rel=1e-5)}
    smooth = 0.85 * target + 0.15 / 8
    assert raw(smoothing=0.15, temperature=4.0) == {"kl": pytest.approx(kl(smooth, z / 4)[valid].mean(), rel=1e-5)}
    train = distributions.load(distributions.DistributionConfig(**DATA)).splits["train"].rows["target"].astype(np.float64)
    weights = 1 / train.sum(0)
    weights *= len(train) / (train @ weights).sum()
    assert raw(class_weights="inverse") == {"kl": pytest.approx((kl(target, z) * (target @ weights))[valid].mean(), rel=1e-5)}
    p = np.exp(log_softmax(z))
    focal = np.sum(target * (1 - p) ** 2 * -np.log(p), axis=1)[valid].mean()
    assert raw(focal=2.0) == {"focal": pytest.approx(focal, rel=1e-5)}
    length = np.linalg.norm(z, axis=1, keepdims=True)
    cap = float(np.median(length))
    assert raw(norm_cap=cap, guards=False)["kl"] == pytest.approx(kl(target, z * np.minimum(1, cap / length))[valid].mean(), rel=1e-5)
    assert raw(logit_norm=0.5, guards=False)["kl"] == pytest.approx(kl(target, z / length / 0.5)[valid].mean(), rel=1e-5)
    missing = np.maximum(2.0 + np.sum(p * np.log(p), axis=1), 0)
    found = raw(entropy_weight=5.0, entropy_floor=2.0, entropy_kind="quadratic", max_suppression=0.1, guards=False)
    assert found["entropy_floor"] == pytest.approx((missing**2)[valid].mean(), rel=1e-4)
    assert found["max_suppression"] == pytest.approx((z.max(1) - z.mean(1))[valid].mean(), rel=1e-5)


def test_what_is_deployed_has_the_bounds_and_its_own_temperature():
    batch = first_batch(built().recipe, "test")
    variables = start(built().recipe)
    z = deployed(built().recipe, variables, batch)
    length = np.linalg.norm(z, axis=1, keepdims=True)
    of = lambda **soft: deployed(built(soft=soft | {"guards": False}).recipe, variables, batch)  # noqa: E731
    np.testing.assert_allclose(of(temperature=4.0), z, rtol=1e-5)  # of the training alone
    np.testing.assert_allclose(of(temperature_inference=4.0), z / 4, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(of(norm_cap=0.1), axis=1), 0.1, rtol=1e-4)
    np.testing.assert_allclose(of(logit_norm=0.5), 2 * z / length, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of(smoothing=0.5, entropy_weight=9.0, entropy_floor=2.0, mixup=1.0), z, rtol=1e-5)  # evaluation sees no loss


def test_logits_are_watched():
    recipe = built(soft=dict(temperature=2.0)).recipe
    batch, variables = first_batch(recipe), start(recipe)
    batch["valid"][0] = False
    z = deployed(recipe, variables, batch)[batch["valid"]] / 2
    _, _, probes = look(recipe, variables, batch)
    p = np.exp(log_softmax(z))
    wanted = {"logit_max": z.max(1), "logit_min": z.min(1), "logit_range": np.ptp(z, axis=1), "logit_norm": np.linalg.norm(z, axis=1),
              "entropy": -np.sum(p * np.log(p), axis=1)}  # fmt: skip
    assert {name: float(total / count) for name, (total, count) in probes.items() if name in wanted} == pytest.approx(
        {name: values.mean() for name, values in wanted.items()}, rel=1e-4)  # fmt: skip


def test_mixup_mixes_rows_with_their_targets():
    """With itself a row changes nothing, nor with padding; of another key other pairs; the target goes with the row."""
    recipe = built(soft=dict(mixup=0.4)).recipe
    variables, batch = start(recipe), first_batch(recipe)
    same = {name: np.repeat(value[:1], 16, axis=0) for name, value in batch.items()}
    plain = built().recipe
    assert look(recipe, variables, same)[0] == pytest.approx(look(plain, variables, same)[0], rel=1e-5)
    a, b = (look(recipe, variables, batch, key=i)[0] for i in (0, 1))
    assert abs(a - b) > 1e-5
    alone = batch | {"valid": np.arange(16) == 2}
    assert look(recipe, variables, alone)[0] == pytest.approx(look(plain, variables, alone)[0], rel=1e-5)


def test_a_mixed_row_has_a_mixed_target():
    """Of equal rows with targets of their own only the targets are mixed, which then are less certain: a smaller divergence from an even
    prediction."""
    recipe = built(soft=dict(mixup=1.0)).recipe
    variables, batch = start(recipe), first_batch(recipe)
    variables.params["head"] = jax.tree.map(jnp.zeros_like, variables.params["head"])
    batch |= {"x": np.repeat(batch["x"][:1], 16, axis=0), "target": np.eye(8, dtype=np.float32)[np.arange(16) % 8]}
    _, raw, _ = look(recipe, variables, batch)
    assert np.log(4) < raw["kl"] < 0.95 * np.log(8)  # of one-hot targets it is log 8, of the mean of two at least log 4


def test_the_last_layer_decays_by_itself():
    c = dict(soft=dict(final_decay=0.01), optimizer=dict(weight_decay=0.001))
    one = prepare.prepare(built("graph", **c), sharding.make_mesh((1, 1, 1)), dry=True)
    decay = {optim.path_name(path): group.weight_decay for path, group in jax.tree.leaves_with_path(one.groups)}
    assert decay["head/kernel"] == pytest.approx(0.011)
    matrices = {name for name in decay if name.endswith("/kernel")}
    assert {name for name, value in decay.items() if value == 0.001} == matrices - {"head/kernel"}
    assert all(value == 0 for name, value in decay.items() if not name.endswith("kernel"))


# -- guards -------------------------------------------------------------------------------------------------------------------


def test_the_wall_is_where_the_guard_says():
    """The norm cap that the error accepts reaches the targets' 99th percentile, and a hundredth less does not."""
    target = np.random.default_rng(0).dirichlet(np.full(8, 0.2), 400)
    most = np.percentile(target.max(1), 99)
    capped = dict(norm_cap=1.0, temperature=2.0, temperature_inference=2.0)
    for options, key in ((capped, "norm_cap"), (dict(logit_norm=5.0), "logit_norm")):
        with pytest.raises(UserError) as refused:
            SoftConfig(**options).guard(target)
        text = str(refused.value).split("accepted: 0, or ")[1]
        needed = float(text.split()[0])
        further = 1.01 if key == "norm_cap" else 0.99
        SoftConfig(**options | {key: needed * further}).guard(target)
        length = lambda value, key=key: value / 2 if key == "norm_cap" else 1 / value  # noqa: E731
        assert regularisation.largest_probability(length(needed), 8) == pytest.approx(most, abs=3e-3)
        with pytest.raises(UserError):
            SoftConfig(**options | {key: needed / further}).guard(target)


def test_no_logits_of_that_length_do_better():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(20_000, 8))
    z *= 2.5 / np.linalg.norm(z, axis=1, keepdims=True)
    best = np.full(8, -1 / 7)
    best[0] = 1
    bound = regularisation.largest_probability(2.5, 8)
    assert np.exp(log_softmax(z)).max() < bound
    assert np.exp(log_softmax(2.5 * best / np.linalg.norm(best)))[0] == pytest.approx(bound, rel=1e-5)


def test_guards_can_be_turned_off(caplog):
    target = np.random.default_rng(0).dirichlet(np.full(8, 0.5), 400)
    entropy = -np.sum(target * np.log(target), axis=1)
    floor = float(np.percentile(entropy, 5))
    SoftConfig(entropy_weight=5.0, entropy_floor=floor - 1e-3).guard(target)
    over = dict(entropy_weight=5.0, entropy_floor=floor + 1e-3)
    with pytest.raises(UserError, match=rf"entropy_floor: found {floor + 1e-3:g}, above {floor:.3f}, the 5th percentile"):
        SoftConfig(**over).guard(target)
    with caplog.at_level(logging.WARNING, logger="jaxdistill.recipes.soft_options"):
        SoftConfig(**over, guards=False).guard(target)
    assert "soft.guards is off: soft.entropy_floor: found" in caplog.text


# -- configs ------------------------------------------------------------------------------------------------------------------


def test_shipped_configs(tmp_path):
    """Every run of every variant builds (of :ldl with a set), and those that are of a variant alone take two updates."""
    import scipy.io

    rng = np.random.default_rng(0)
    scipy.io.savemat(tmp_path / "set.mat", {"features": rng.normal(size=(60, 5)), "labels": rng.dirichlet(np.ones(4), 60)})
    small = dict(steps=2, batch=8, eval_every=1, checkpoint_every=2)
    for variant in ("document_002", "ldl"):
        c = config_file.get_config(variant)
        c.mesh = (1, 1, 1)
        c.train.update(small)
        if variant == "ldl":
            c.data.path, c.seeds, c.runs = str(tmp_path / "set.mat"), (0, 3), ("softmax", "mlp")
        else:
            c.runs, c.headline, c.soft.figures = ("softmax", "document"), "document", False
            c.data.update(dict(cities=1, addresses=6, neighbours=4))
            c.model.graph.update(dict(width=8, heads=2))
        results = loop.run(c, tmp_path / variant, quiet=True)
        rows = {(row["name"], row["seed"]): row for row in results["rows"]}
        assert all(row["kl"] > 0 for row in rows.values())
        if variant == "ldl":  # each seed is a fold, and pairs are of the same one
            assert rows["softmax", 0]["kl_constant"] == rows["mlp", 0]["kl_constant"] != rows["mlp", 3]["kl_constant"]
            assert {pair["n"] for pair in results["paired"]} == {2}
    with pytest.raises(ValueError, match="found variant 'ferplus'; accepted: seeds, ldl, document_002"):
        config_file.get_config("ferplus")
