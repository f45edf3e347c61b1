"""Norms of groups, leaves that moved, and the fingerprint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.diagnosis import probes
from jaxdistill.recipe import Group
from jaxdistill.training import sharding


def tree(dtype=np.float32) -> dict:
    rng = np.random.default_rng(0)
    return {"a": rng.normal(size=(8, 4)).astype(dtype), "b": rng.normal(size=16).astype(dtype), "none": None}


def test_norms_by_group():
    groups = {"a": Group("one"), "b": Group("two"), "c": Group("two")}
    grads = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.asarray([2.0]), "c": jnp.zeros(2)}
    params = {"a": jnp.asarray([10.0, 0.0]), "b": jnp.zeros(1), "c": jnp.zeros(2)}
    found = jax.tree.map(float, probes.group_norms(grads, grads, params, groups))
    assert found == {"one": {"grad_norm": 5.0, "param_norm": 10.0, "update_ratio": 0.5},
                     "two": {"grad_norm": 2.0, "param_norm": 0.0, "update_ratio": 0.0}}


def test_moved():
    assert probes.moved({"a": jnp.zeros(3), "b": jnp.asarray([0.0, 1e-30]), "c": jnp.asarray(-0.0)}).tolist() == [False, True, False]


class TestFingerprint:
    @pytest.mark.parametrize("spec", [jax.P(), jax.P("data"), jax.P(("data", "fsdp")), jax.P("fsdp", "model")])
    def test_the_same_wherever_the_bits_lie(self, spec):
        host = tree()["a"]
        placed = jax.device_put(host, jax.NamedSharding(sharding.make_mesh((2, 2, 2)), spec))
        assert probes.fingerprint(placed) == probes.fingerprint(host)

    def test_a_new_value_each_time(self):
        values = {int(probes.fingerprint(x)) for x in (tree(), {"a": tree()["a"]}, {"b": tree()["b"]}, {"x": tree()}, ())}
        assert len(values) == 4  # names are not its business: the checkpoint keeps them beside it

    @pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.int32, np.int8, np.uint8])
    def test_any_flipped_bit_changes_it(self, dtype):
        host = tree(np.float32)["b"]
        host = (20 * host).astype(dtype) if np.issubdtype(dtype, np.integer) else host.astype(dtype)
        size = host.dtype.itemsize
        changed = [host]
        for index in (0, 1, 7, 15):
            for bit in range(8 * size):
                content = bytearray(host.tobytes())
                content[index * size + bit // 8] ^= 1 << bit % 8
                changed.append(np.frombuffer(bytes(content), host.dtype))
        assert len({int(probes.fingerprint(one)) for one in changed}) == len(changed)

    def test_two_values_that_change_places(self):
        host = tree()["b"]
        seen = {int(probes.fingerprint(host))}
        for i in range(16):
            for j in range(i):
                swapped = host.copy()
                swapped[[i, j]] = swapped[[j, i]]
                seen.add(int(probes.fingerprint(swapped)))
        assert len(seen) == 1 + 16 * 15 // 2
        assert probes.fingerprint((host, host + 1)) != probes.fingerprint((host + 1, host))

    def test_minus_zero_and_what_a_nan_carries(self):
        bits = np.asarray([0x00000000, 0x80000000, 0x7FC00000, 0x7FC00001, 0xFFC00000], np.uint32)
        assert len({int(probes.fingerprint(np.asarray([one]).view(np.float32))) for one in bits}) == 5

    def test_keys_bools_scalars_and_nothing(self):
        for one, other in ((jax.random.key(0), jax.random.key(1)), (np.asarray([True, False]), np.asarray([False, True])), (3, 4)):
            assert probes.fingerprint(one) != probes.fingerprint(other)
        assert int(probes.fingerprint({})) == 0
        assert int(probes.fingerprint(jnp.zeros((0, 3)))) == 0
