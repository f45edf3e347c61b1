"""dcal: what it trains, what it says together, what it exports, and how it is taught. (What holds of any recipe: tests/invariants.)"""

import base64
import io
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from jaxdistill import UserError, report
from jaxdistill.data import images
from jaxdistill.models import classifier
from jaxdistill.recipe import Dials
from jaxdistill.training import loop, optim, plan, prepare, sharding
from jaxdistill.training.defaults import defaults
from tests.invariants.checks import QUICK
from tests.training.test_loop import interrupt

DATA = dict(source="glyphs", size=(16, 16), classes=6, per_class=8, test_per_class=4, validation=0.25)
MODEL = dict(patch=8, width=8, depth=1, heads=2)
MODES = ("sa_only", "sa_glca", "sa_pwca", "full", "random_query", "noise_distractor")


@pytest.fixture(scope="module", autouse=True)
def _forgotten():
    """What is loaded here is of no use to others."""
    yield
    images.load.cache_clear()


def config(*runs: str, **changes) -> ConfigDict:
    """A job of a run for each of these modes. changes: of sections (dicts), or of keys."""
    c = defaults()
    c.mesh, c.monitor, c.minimize = (1, 1, 1), "validation/nll", True
    c.data, c.model, c.dcal, c.loss = ConfigDict(DATA), ConfigDict(MODEL), ConfigDict(dict(queries=0.5)), ConfigDict()
    c.train.update(dict(steps=4, batch=8, lr=1e-2, eval_every=2, checkpoint_every=2))
    c.runs, c.run = runs, ConfigDict({mode: dict(recipe="dcal", dcal=dict(mode=mode)) for mode in runs})
    for name, change in changes.items():
        c[name] = ConfigDict(c.get(name, ConfigDict()).to_dict() | change) if isinstance(change, dict) else change
    return c


def ready(mode: str, *, dry=False, **changes) -> prepare.Prepared:
    built = prepare.build(plan.expand(config(mode, **changes))[0])
    return prepare.prepare(built, sharding.make_mesh((1, 1, 1)), dry=dry)


def look(one: prepare.Prepared):
    """A function of (params, batch): the total, and of each term its raw value and its factor, and the probes."""
    recipe = one.built.recipe

    def values(params, frozen, batch):
        scale = {name: 1.0 if name == "prior" else 1 / 8 for name, weight in recipe.weights.items() if not weight.off}
        knobs = {name: schedule(jnp.asarray(0)) for name, schedule in recipe.knobs.items()}
        total, aux = recipe.loss(params, {}, frozen, batch, Dials(scale, knobs), jax.random.key(0))
        whole, _ = recipe.whole(params, {}, aux.stats, knobs)
        total += sum(scale[name] * term.factor * term.sum for name, term in whole.items())
        return total, {name: (term.sum / term.count, term.factor) for name, term in (aux.terms | whole).items()}, aux.probes

    compiled = jax.jit(values, compiler_options=QUICK)
    return lambda params, batch: jax.device_get(compiled(params, one.frozen, batch))


def first_batch(one: prepare.Prepared, split: str = "train") -> dict:
    return dict(next(one.built.recipe.data(split, 0)))


def softmax(z):
    z = np.asarray(z, np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


# A job


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(workdir, rows by name) of a plain ViT and of all branches."""
    workdir = tmp_path_factory.mktemp("dcal") / "job"
    c = config("sa_only", "full")
    c.run.full.dcal.figures = 2
    return workdir, {row["name"]: row for row in loop.run(c, workdir, quiet=True)["rows"]}


def reloaded(workdir, name: str):
    """(logits by branch in float64, labels) of the test split, from what a run exported."""
    sets = images.load(images.ImageConfig(**DATA))
    chosen = classifier.ModelConfig(path=str(workdir / f"runs/{name}-0/export"), head="stored")
    found = classifier.describe(chosen, "model", image=(16, 16), channels=1, classes=sets.classes)
    test = sets.splits["test"]
    pixels = jnp.asarray(np.stack([test.read(i) for i in range(len(test))]))
    logits = jax.jit(lambda p: found.module.apply({"params": p}, found.normalise(pixels))[0])(found.load())
    return {branch: np.asarray(z, np.float64) for branch, z in logits.items()}, test.labels


def test_branches_speak_with_the_mean_of_their_probabilities(job):
    """Of what was exported, by definition; the run measured the same before it exported."""
    workdir, rows = job
    logits, labels = reloaded(workdir, "full")
    assert logits.keys() == {"sa", "glca"}
    at = np.arange(len(labels))
    p = {branch: softmax(z) for branch, z in logits.items()}
    p[""] = (p["sa"] + p["glca"]) / 2
    for branch, q in p.items():
        prefix = f"{branch}_" if branch else ""
        assert rows["full"][f"{prefix}nll"] == pytest.approx(-np.log(q[at, labels]).mean(), rel=1e-5)
        assert rows["full"][f"{prefix}accuracy"] == pytest.approx((q.argmax(-1) == labels).mean())
        assert rows["full"][f"{prefix}brier"] == pytest.approx(((q - np.eye(6)[labels]) ** 2).sum(-1).mean(), rel=1e-5)
    of_mean_logits = softmax((logits["sa"] + logits["glca"]) / 2)
    assert abs(-np.log(of_mean_logits[at, labels]).mean() - rows["full"]["nll"]) > 1e-6  # which is another classifier


def test_a_plain_vit_is_one_of_transformers(job):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    workdir, rows = job
    theirs = transformers.ViTForImageClassification.from_pretrained(workdir / "runs/sa_only-0/export").eval()
    test = images.load(images.ImageConfig(**DATA)).splits["test"]
    told = json.loads((workdir / "runs/sa_only-0/export/preprocessor_config.json").read_text())
    pixels = np.stack([test.read(i) for i in range(len(test))]).astype(np.float32) / 255
    pixels = (pixels - np.float32(told["image_mean"])) / np.float32(told["image_std"])
    with torch.no_grad():
        wanted = theirs(torch.tensor(pixels).permute(0, 3, 1, 2)).logits.numpy()
    logits, labels = reloaded(workdir, "sa_only")
    assert logits.keys() == {"sa"}
    np.testing.assert_allclose(logits["sa"], wanted, atol=1e-5)
    assert rows["sa_only"]["nll"] == pytest.approx(-np.log(softmax(wanted)[np.arange(len(labels)), labels]).mean(), rel=1e-5)
    assert "sa_nll" not in rows["sa_only"]


def test_the_attention_is_drawn_and_in_the_report(job):
    workdir, _ = job
    drawn = (workdir / "runs/full-0/figures/attention.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert not (workdir / "runs/sa_only-0/figures").exists()
    report.main(["report", str(workdir)])
    [shown] = re.findall(r'src="data:image/png;base64,([^"]+)"', (workdir / "report.html").read_text())
    ours, theirs = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), float) for png in (base64.b64decode(shown), drawn))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).mean() < 2  # of 255: with fewer colours


def test_a_resumed_run_is_the_same_to_the_bit(job, tmp_path, monkeypatch):
    workdir, rows = job
    c = config("full", dcal=dict(queries=0.5, figures=2))
    with monkeypatch.context() as patch:
        interrupt(patch, at=2)
        with pytest.raises(loop.Interrupted):
            loop.run(c, tmp_path, quiet=True)
    row = loop.run(c, tmp_path, quiet=True)["rows"][0]
    assert row | {"seconds": 0} == rows["full"] | {"seconds": 0}
    for name in ("export/model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "runs/full-0" / name).read_bytes() == (workdir / "runs/full-0" / name).read_bytes()


# What is trained


def test_modes_are_parameter_trees():
    found = {}
    for mode in MODES:
        one = ready(mode, dry=True)
        student = {path: leaf.shape for path, leaf in
                   ((optim.path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(one.abstract.params["student"]))}
        found[mode] = student, set(one.abstract.params.get("balance", ()))
    glca = {path for path in found["full"][0] if path.startswith(("glca_block/", "glca_ln_f/", "glca_head/"))}
    assert {path.split("/")[0] for path in found["full"][0]} == {"vit", "glca_block", "glca_ln_f", "glca_head"}
    assert found["sa_only"] == (found["sa_pwca"][0], set())
    assert found["sa_only"][0].keys() == found["full"][0].keys() - glca
    assert found["sa_glca"] == (found["full"][0], {"sa", "glca"})
    assert found["sa_pwca"][1] == {"sa", "pwca"}
    assert found["full"] == found["random_query"] == found["noise_distractor"]
    own = ready("full", dry=True, dcal=dict(queries=0.5, pwca_head="own")).abstract.params["student"]
    assert own.keys() - {"pwca_head"} == {path.split("/")[0] for path in found["full"][0]}
    assert not ready("full", dry=True, dcal=dict(weighting="equal")).abstract.params.keys() - {"student"}


@pytest.fixture(scope="module")
def full():
    one = ready("full")
    return one, look(one), first_batch(one)


def test_the_total_is_that_of_the_paper(full):
    one, values, batch = full
    w = {"sa": 0.3, "glca": -0.7, "pwca": 1.1}
    params = one.state.params | {"balance": {name: jnp.float32(value) for name, value in w.items()}}
    total, terms, probes = values(params, batch)
    raw = {name: float(terms[name][0]) for name in w}
    assert all(1 < value < 4 for value in raw.values())  # about log 6
    assert total == pytest.approx(0.5 * sum(np.exp(-w[name]) * raw[name] + w[name] for name in w), rel=1e-6)
    assert terms["prior"][0] == pytest.approx(0.5 * sum(w.values()), rel=1e-6)
    found, count = probes["sum_of_ce"]
    assert found / count == pytest.approx(sum(raw.values()), rel=1e-6)
    assert {name: float(probes[f"w_{name}"][0]) for name in w} == pytest.approx(w)


def test_the_total_may_be_negative(full):
    """A loss near 0 with its w below 0."""
    one, values, batch = full
    batch = batch | {"label": np.zeros_like(batch["label"])}
    params = jax.tree.map(lambda x: x, one.state.params)
    sure = jnp.zeros(6).at[0].set(40.0)
    params["student"]["vit"]["head"]["bias"] = params["student"]["glca_head"]["bias"] = sure
    params["balance"] = {name: jnp.float32(-1.0) for name in params["balance"]}
    total, _, probes = values(params, batch)
    assert probes["sum_of_ce"][0] < 1e-3
    assert total == pytest.approx(-1.5, abs=1e-3)


def test_bounds_of_w():
    one = ready("full", dcal=dict(queries=0.5, bounds=(-2.0, 2.0)))
    params = one.state.params | {"balance": {"sa": jnp.float32(5.0), "glca": jnp.float32(-5.0), "pwca": jnp.float32(0.5)}}
    _, terms, _ = look(one)(params, first_batch(one))
    assert {name: float(terms[name][1]) for name in ("sa", "glca", "pwca")} == pytest.approx(
        {"sa": 0.5 * np.exp(-2), "glca": 0.5 * np.exp(2), "pwca": 0.5 * np.exp(-0.5)})
    assert terms["prior"][0] == pytest.approx(0.25)


def test_random_queries_and_noise_are_other_losses(full):
    """Each of them in its own branch alone; noise asks for no partner, the others do."""
    one, values, batch = full
    _, terms, _ = values(one.state.params, batch)
    alone = batch | {"partner": np.full_like(batch["partner"], 99)}
    _, lost, _ = values(one.state.params, alone)
    assert np.isnan(lost["pwca"][0])
    seen = look(ready("noise_distractor"))
    _, noisy, _ = seen(one.state.params, batch)
    assert seen(one.state.params, alone)[1] == noisy
    half = dict(queries=0.5)
    by_rollout, at_random = (look(ready(mode, dcal=half))(one.state.params, batch)[1] for mode in ("full", "random_query"))
    for a, b, branch in ((terms, noisy, "pwca"), (by_rollout, at_random, "glca")):
        for name in ("sa", "glca", "pwca"):
            assert (abs(a[name][0] - b[name][0]) < 1e-5) == (name != branch), (branch, name)


def test_a_partner_in_another_micro_batch_is_never_a_wrong_one(full):
    """Row 0's partner is row 1, which is in the other micro-batch: the update is skipped and counted. Noise has no partners."""
    one = ready("full", train=dict(micro=2))
    batch = first_batch(one)
    apart = (batch["partner"] - batch["row"]) % 8
    assert len(set(apart.tolist())) == 1
    assert apart[0] % 2 == 0
    assert apart[0] != 0
    step = one.step.lower(one.state, one.frozen, one.place(batch)).compile(compiler_options=QUICK)
    before = jax.device_get(one.state.params)
    bad = batch | {"partner": np.where(batch["row"] == 0, 1, batch["partner"]).astype(np.int32)}
    now, metrics = step(one.state, one.frozen, one.place(bad))
    assert not bool(metrics["finite"])
    assert (int(now.step), int(now.skipped)) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(now.params), before)
    now, metrics = step(now, one.frozen, one.place(batch))
    assert bool(metrics["finite"])
    assert (int(now.step), int(now.skipped)) == (2, 1)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), jax.device_get(now.params), before)
    assert all(moved["balance"].values())


def test_noise_trains(tmp_path):
    row = loop.run(config("noise_distractor", train=dict(steps=2)), tmp_path, quiet=True)["rows"][0]
    assert (row["steps"], row["skipped"]) == (2, 0)
    assert row["glca_nll"] > 0


# Groups


def groups_of(**changes):
    one = ready("full", dry=True, **changes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), one.abstract.params)
    tx = optim.optimizer(one.built.optimizer, one.groups)
    update = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0], compiler_options=QUICK)
    return one, params, lambda grads: jax.device_get(update(grads, params))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_without_a_gradient_only_matrices_shrink(name):
    """By exactly 1 - lr x wd; normalisations, biases, positions, CLS and w stay."""
    one, params, update = groups_of(optimizer=dict(name=name, weight_decay=0.05, clip=1.0))
    updates = update(jax.tree.map(np.zeros_like, params))
    rate, decay = np.float32(0.01), np.float32(0.05)
    count = {True: 0, False: 0}
    for (path, leaf), update in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(updates), strict=True):
        name = optim.path_name(path)
        decayed = name.endswith("/kernel")
        count[decayed] += 1
        np.testing.assert_array_equal(leaf + rate * update, leaf - rate * (decay * leaf) if decayed else leaf, err_msg=name)
    assert count == {True: 6 + 6 + 1 + 2, False: len(jax.tree.leaves(params)) - 15}


def test_w_moves_at_its_own_rate():
    moved = {}
    for mult in (1.0, 3.0):
        one, params, update = groups_of(dcal=dict(weight_lr=mult), optimizer=dict(name="sgd", clip=0.0, weight_decay=0.0))
        moved[mult] = update(jax.tree.map(np.ones_like, params))
        rows = {row["group"]: (row["lr_mult"], row["weight_decay"]) for row in optim.table(one.abstract.params, one.groups)}
        assert rows["balance"] == (mult, 0.0)
    assert {float(x) for x in jax.tree.leaves(moved[1.0]["balance"])} == {-1.0}
    assert {float(x) for x in jax.tree.leaves(moved[3.0]["balance"])} == {-3.0}
    jax.tree.map(np.testing.assert_array_equal, moved[1.0]["student"], moved[3.0]["student"])


# A teacher


KD = dict(weight=((0.0, 1.0),), temperature=((0.0, 2.0),))


def test_a_student_that_is_its_teacher_has_nothing_to_learn(job):
    folder = str(job[0] / "runs/sa_only-0/export")
    same = dict(patch=0, width=0, depth=0, heads=0, path=folder, head="stored")
    one = ready("sa_only", kd=KD, teacher=dict(path=folder), model=same)
    _, terms, _ = look(one)(one.state.params, first_batch(one))
    assert terms["kd"][0] == pytest.approx(0, abs=1e-6)
    evaluator = one.built.recipe.evaluators["test"]
    measure = jax.jit(lambda batch: evaluator.measure(one.state.params, None, one.frozen, batch))
    found = evaluator.finish(jax.tree.map(lambda *x: np.stack(x), *[jax.device_get(measure(b)) for b in one.built.recipe.data("test", 0)]))
    assert found["top1_agreement"] == 1
    assert found["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert found["nll"] == pytest.approx(job[1]["sa_only"]["nll"], rel=1e-6)


def test_a_teacher_of_transformers(tmp_path):
    """Plain ViT, unnamed classes, another size of images: T^2 KL(teacher || student), by definition from its own logits."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(
        image_size=16, patch_size=4, num_channels=1, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=6, initializer_range=0.5)).eval()
    theirs.save_pretrained(tmp_path)
    one = ready("sa_only", kd=KD, teacher=dict(path=str(tmp_path)))
    batch = first_batch(one)
    _, terms, _ = look(one)(one.state.params, batch)
    with torch.no_grad():
        taught = theirs(torch.tensor(batch["image"].astype(np.float32) / 255 * 2 - 1).permute(0, 3, 1, 2)).logits.numpy()
    recipe = one.built.recipe
    seen = {name: recipe.facts["model"][name] for name in ("mean", "std")}
    chosen = classifier.describe(classifier.ModelConfig(**MODEL, **seen), "model", image=(16, 16), channels=1,
                                 classes=images.load(images.ImageConfig(**DATA)).classes)
    student, _ = chosen.module.apply({"params": one.state.params["student"]}, chosen.normalise(jnp.asarray(batch["image"])))
    p, q = softmax(taught / 2), softmax(np.asarray(student["sa"]) / 2)
    wanted = 4 * (p * np.log(p / q)).sum(-1).mean()
    assert wanted > 0.1
    assert terms["kd"][0] == pytest.approx(wanted, rel=1e-4)
    assert recipe.facts["teacher"]["vit"]["patch"] == 4


def test_a_teacher_of_other_classes_is_one_line(job, tmp_path):
    folder = shutil.copytree(job[0] / "runs/sa_only-0/export", tmp_path / "other")
    raw = json.loads((folder / "config.json").read_text())
    raw["id2label"]["2"] = "x"
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="^config key teacher.path: found 'x' as class 2 of .*; accepted: the data's, 'ó'$"):
        ready("sa_only", kd=KD, teacher=dict(path=str(folder)), dry=True)
    with pytest.raises(UserError, match="^config key teacher.path: found 6 classes in .*; accepted: the data's 5$"):
        ready("sa_only", kd=KD, teacher=dict(path=str(job[0] / "runs/sa_only-0/export")), data=dict(classes=5), dry=True)


@pytest.mark.parametrize(("change", "said"), [
    (dict(loss=dict(margin=0.5)), "loss.margin: found 0.5; accepted: 0.3 with data.task 'classification', which does not use it ('reid'"),
    (dict(loss=dict(identities=4)), "loss.identities: found 4; accepted: 16 with data.task 'classification'"),
    (dict(dcal=dict(bounds=(-2, 2))), "dcal.bounds: found (-2, 2); accepted: () with dcal.mode 'sa_only'"),
    (dict(dcal=dict(weight_lr=9.0)), "dcal.weight_lr: found 9.0; accepted: 1.0 with dcal.mode 'sa_only'"),
    (dict(kd=dict(beta=0.9)), "kd.beta: found 0.9; accepted: 0.5 with kd.kind 'forward_kl'"),
    (dict(teacher=dict(path="x")), "teacher.path: found 'x'; accepted: '' with kd.weight ((0.0, 0.0),)"),
], ids=lambda value: value.split(":")[0] if isinstance(value, str) else "")
def test_an_option_that_no_run_uses(change, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(f"config key {said}")):
        loop.check(config("sa_only", **change), tmp_path)


def test_an_option_that_one_run_uses(tmp_path):
    changed = config("sa_only", "full", dcal=dict(queries=0.5, bounds=(-2, 2), weight_lr=9.0), teacher=dict(path="", cache=""))
    assert len(loop.check(changed, tmp_path)) == 2
