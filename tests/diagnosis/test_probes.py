"""Norms of groups, leaves that moved, what distributions look like, and the fingerprint."""

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
    """Of what the update really changed, not of what the optimizer asked for."""
    groups = {"a": Group("one"), "b": Group("two"), "c": Group("two")}
    grads = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.asarray([2.0]), "c": jnp.zeros(2)}
    before = {"a": jnp.asarray([10.0, 0.0]), "b": jnp.zeros(1), "c": jnp.zeros(2)}
    after = before | {"a": jnp.asarray([13.0, 4.0]), "b": jnp.ones(1)}
    found = jax.tree.map(float, probes.group_norms(grads, before, after, groups))
    assert found == {"one": {"grad_norm": 5.0, "param_norm": 10.0, "update_ratio": 0.5, "changed": 1.0},
                     "two": {"grad_norm": 2.0, "param_norm": 0.0, "update_ratio": 0.0, "changed": 0.5}}


def test_changed_is_of_bits():
    """NaN is not another NaN, and -0 is not 0."""
    groups = dict.fromkeys("ab", Group("one"))
    before = {"a": jnp.asarray([jnp.nan]), "b": jnp.asarray([0.0], jnp.bfloat16)}
    changed = lambda after: float(probes.group_norms(before, before, after, groups)["one"]["changed"])  # noqa: E731
    assert changed(before) == 0
    assert changed(before | {"b": jnp.asarray([-0.0], jnp.bfloat16)}) == 0.5


def test_moved():
    assert probes.moved({"a": jnp.zeros(3), "b": jnp.asarray([0.0, 1e-30]), "c": jnp.asarray(-0.0)}).tolist() == [False, True, False]


LOOK = jax.jit(probes.of_logits)


class TestLogits:
    """Against float64 numpy, of the examples that count."""

    logits, teacher = 3 * np.random.default_rng(1).normal(size=(2, 9, 5)).astype(np.float32)
    labels = np.random.default_rng(2).integers(0, 5, 9)
    where = np.arange(9) % 4 != 2

    def found(self, **more):
        given = {name: getattr(self, name) for name in ("logits", "where", "labels", "teacher")} | more
        return {name: (float(total), float(count)) for name, (total, count) in LOOK(**given).items()}

    def test_definitions(self):
        z, t = (x[self.where].astype(np.float64) for x in (self.logits, self.teacher))
        y, own = self.labels[self.where], np.arange(len(z))
        p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (z, t))
        hidden = lambda p: -(p * np.log(p)).sum(-1)  # noqa: E731
        centred = z - z.mean(1, keepdims=True)
        wanted = {
            "valid": 7 / 9, "entropy": hidden(p).mean(), "spread": hidden(p.mean(0)) - hidden(p).mean(),
            "classes_predicted": len(set(z.argmax(1))) / 5,
            "logit_std": centred.std(0).mean(), "logit_abs_max": np.abs(centred).max(1).mean(),
            "correct": (z.argmax(1) == y).mean(), "nll": -np.log(p[own, y]).mean(), "teacher_entropy": hidden(q).mean(),
            "teacher_kl": (q * np.log(q / p)).sum(1).mean(), "top1_agreement": (z.argmax(1) == t.argmax(1)).mean(),
            "teacher_nll": -np.log(q[own, y]).mean(),
        }
        found = self.found()
        assert {name: total / count for name, (total, count) in found.items()} == pytest.approx(wanted, rel=2e-6)
        assert all(count == (9 if name == "valid" else 7) for name, (_, count) in found.items())

    def test_of_distributions_as_labels(self):
        soft = np.exp(self.teacher) / np.exp(self.teacher).sum(1, keepdims=True)
        z = self.logits.astype(np.float64)
        log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
        found = self.found(labels=soft)
        assert found["nll"][0] == pytest.approx(-(soft * log_p)[self.where].sum(), rel=2e-6)
        assert found["correct"][0] == (z.argmax(1) == soft.argmax(1))[self.where].sum()

    def test_what_does_not_count_may_hold_anything(self):
        broken = {name: np.where(self.where[:, None], getattr(self, name), np.nan).astype(np.float32) for name in ("logits", "teacher")}
        assert self.found(**broken) == self.found()
        nothing = self.found(where=np.zeros(9, bool))
        assert {pair for name, pair in nothing.items() if name != "valid"} == {(0.0, 0.0)}

    def test_two_collapses_look_unlike(self):
        """A constant predictor has entropy and no spread; saturated predictions have spread and no entropy."""
        constant = self.found(logits=jnp.broadcast_to(jnp.asarray([[1.0, 0.0, 2.0, 0.0, 0.5]]), (9, 5)) + jnp.arange(9.0)[:, None])
        assert constant["logit_std"][0] == pytest.approx(0, abs=1e-5)  # what all logits of an example share is nothing
        assert constant["spread"][0] / 7 == pytest.approx(0, abs=1e-5)
        assert constant["entropy"][0] / 7 > 1
        saturated = self.found(logits=100.0 * jax.nn.one_hot(jnp.arange(9) % 5, 5))
        assert saturated["entropy"][0] / 7 == pytest.approx(0, abs=1e-5)
        assert saturated["spread"][0] / 7 > 1
        assert saturated["logit_abs_max"][0] / 7 == pytest.approx(80)

    def test_micro_batches(self):
        """What is a mean over examples adds up; what is of the batch as a whole is that of the parts, averaged."""
        parts = [self.found(**{name: getattr(self, name)[part] for name in ("logits", "where", "labels", "teacher")})
                 for part in (slice(0, 5), slice(5, 9))]
        for name, (total, count) in self.found().items():
            sums = [sum(part[name][i] for part in parts) for i in (0, 1)]
            assert sums[1] == count
            assert sums[0] == pytest.approx(total, rel=1e-5) or name in probes.BATCHWISE, name
            assert sums[0] < total or name not in ("spread", "logit_std")

    def test_abs_max(self):
        x = jnp.asarray([[[1.0, -3.0]], [[9.0, 0.0]], [[0.5, 0.0]]])
        found = probes.abs_max([x, jnp.asarray([[-4.0], [99.0], [0.0]])], jnp.asarray([True, False, True]))
        assert (float(found[0]), float(found[1])) == (4.5, 2.0)


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
