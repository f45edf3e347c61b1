"""Meshes: whichever devices hold the arrays, the update is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.training import sharding
from tests import jobs

MESHES = [(1, 1, 1), (8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 8, 1)]


def job(mesh):
    config = jobs.toy(kd=((0.0, 0.5), (1.0, 0.7)))
    config.mesh = mesh
    config.optimizer.update(name="sgd", clip=0.5)  # Adam would divide rounding noise by itself
    config.train.lr = 0.1
    return config


def updated(mesh, updates: int = 4):
    """(the state after some updates, its run)."""
    ready = jobs.ready(job(mesh))
    data, state = ready.built.recipe.data("train", 0), ready.state
    for _ in range(updates):
        state, metrics = ready.step(state, ready.frozen, ready.place(next(data)))
    return jax.device_get((state.params, state.ema, state.extra, metrics["loss"])), ready


@pytest.fixture(scope="module")
def one():
    return updated((1, 1, 1))[0]


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_every_mesh_gives_the_same_update(mesh, one):
    found, _ = updated(mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, one)


def test_micro_batches_on_a_mesh(one):
    config = job((4, 1, 2))
    config.train.micro = 4
    ready = jobs.ready(config)
    data, state = ready.built.recipe.data("train", 0), ready.state
    for _ in range(4):
        state, _ = ready.step(state, ready.frozen, ready.place(next(data)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), jax.device_get(state.params), one[0])


@pytest.mark.parametrize("mesh", [(4, 2, 1), (2, 2, 2), (1, 8, 1)])
def test_a_device_holds_its_share_of_state(mesh):
    """Of parameters, moments and average, where rules cover all leaves."""
    config = job(mesh)
    config.optimizer.name = "adamw"
    rules = ((r"(body|projector|still)/kernel", jax.P("fsdp", "model")), (r"bias|head", jax.P(("fsdp", "model"))))
    ready = jobs.ready(config, lambda recipe: recipe._replace(sharding_rules=rules))
    tree = [x for x in jax.tree.leaves((ready.state.params, ready.state.opt, ready.state.ema)) if x.ndim]
    whole = sum(x.nbytes for x in tree)
    mine = sum(x.addressable_shards[0].data.nbytes for x in tree)
    assert mine <= whole / (mesh[1] * mesh[2]) * 1.05


def test_moments_and_average_lie_where_their_parameter_lies():
    config = job((2, 2, 2))
    config.optimizer.name = "adamw"
    ready = jobs.ready(config)
    after, _ = ready.step(ready.state, ready.frozen, ready.place(next(ready.built.recipe.data("train", 0))))
    places = {}
    for path, leaf in jax.tree.leaves_with_path((after.params, after.opt, after.ema)):
        name = sharding.path_name(path)
        for part in ("body/kernel", "body/bias", "projector/kernel"):
            if name.endswith(part):
                places.setdefault(part, []).append(leaf.sharding.spec)
    assert {part: len(found) for part, found in places.items()} == {"body/kernel": 4, "body/bias": 4, "projector/kernel": 4}
    assert places["body/kernel"] == [jax.P("fsdp", "model")] * 4
    assert places["body/bias"] == [jax.P(("fsdp", "model"))] * 4


class TestMesh:
    def test_one_entry_may_be_what_is_left(self):
        assert dict(sharding.make_mesh((-1, 2, 1)).shape) == {"data": 4, "fsdp": 2, "model": 1}
        assert dict(sharding.make_mesh((2, 2, -1)).shape) == {"data": 2, "fsdp": 2, "model": 2}

    def test_fewer_devices_than_there_are(self):
        assert sharding.make_mesh((3, 1, 1)).size == 3

    @pytest.mark.parametrize("mesh", [(16, 1, 1), (-1, -1, 1), (0, 1, 1), (-2, 1, 1), (8, 1), (-1, 3, 1), (4, 4, 1), 8, ("8", 1, 1)])
    def test_wrong(self, mesh):
        with pytest.raises(UserError, match="^mesh: found"):
            sharding.make_mesh(mesh)

    @pytest.mark.parametrize(("batch", "micro"), [(12, 1), (8, 2), (16, 3), (0, 1), (16, 0)])
    def test_a_batch_that_does_not_divide(self, batch, micro):
        mesh = sharding.make_mesh((4, 2, 1))
        sharding.check_batch(16, 2, mesh)
        with pytest.raises(UserError, match=rf"train\.batch: found {batch}"):
            sharding.check_batch(batch, micro, mesh)

    def test_a_width_that_does_not_divide(self):
        mesh = sharding.make_mesh((1, 1, 8))
        with pytest.raises(UserError, match=r"cuts axis 1 of body/kernel \(8, 12\) into 8"):
            sharding.shardings({"body": {"kernel": jnp.zeros((8, 12))}}, ((r"body/kernel", jax.P(None, "model")),), mesh)


class TestPut:
    def test_it_copies(self):
        places = sharding.shardings({"x": 0}, (), sharding.make_mesh((1, 1, 1)))
        source = {"x": jnp.arange(8.0)}
        placed = sharding.put(source, places)
        jax.jit(lambda tree: {"x": tree["x"] + 1}, donate_argnums=0)(placed)
        assert placed["x"].is_deleted()
        np.testing.assert_array_equal(source["x"], np.arange(8.0))

    def test_a_second_put_copies_too(self):
        places = sharding.shardings({"x": 0}, (), sharding.make_mesh((4, 2, 1)))
        first = sharding.put({"x": np.arange(8.0, dtype=np.float32)}, places)
        second = sharding.put(first, places)
        jax.jit(lambda tree: {"x": tree["x"] + 1}, donate_argnums=0)(second)
        np.testing.assert_array_equal(first["x"], np.arange(8.0))

    def test_the_fresh_state_owns_all_its_memory(self):
        ready = jobs.ready(jobs.toy())
        held = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((ready.state.replace(rng=None), ready.frozen))]
        assert len(set(held)) == len(held)
