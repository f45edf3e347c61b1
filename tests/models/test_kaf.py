"""Kernel activations against their formula in float64; the fused evaluation against the naive one; fits against measured errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.models import kaf
from jaxdistill.models.kaf import INITS, KAF, KAF2D, PRESETS, TARGETS, KAFConfig, beyond, ridge

ELU_ERRORS = {"paper": 1.34e-2, "torch": 1.64e-2, "keras": 6.9e-3}


def formula(s, alpha, gamma, points):
    """(f, df/ds, df/dalpha, df/dgamma) in float64, of each input: [rows, units], and [rows, size, units] of alpha."""
    s, alpha, gamma, points = (np.asarray(x, np.float64) for x in (s, alpha, gamma, points))
    apart = s[:, None, :] - points[None, :, None]
    kernel = np.exp(-gamma[None, None] * apart**2)
    weighted = alpha[None] * kernel
    return weighted.sum(1), (weighted * -2 * gamma[None, None] * apart).sum(1), kernel, (weighted * -(apart**2)).sum(1)


def given(preset: str, rows: int, units: int, seed: int = 0):
    """(s, alpha, gamma, points, pull): inputs within and beyond the dictionary, and a gamma for each neuron."""
    rng, p = np.random.default_rng(seed), PRESETS[preset]
    s = rng.uniform(-1.5 * p.bound, 1.5 * p.bound, (rows, units))
    alpha = rng.normal(0, p.std, (p.size, units))
    gamma = p.gamma * rng.uniform(0.5, 3, units)
    arrays = [jnp.asarray(x, jnp.float32) for x in (s, alpha, gamma, rng.normal(size=(rows, units)))]
    return *arrays[:3], tuple(p.points.tolist()), arrays[3]


@pytest.mark.parametrize(("evaluate", "units"), [(kaf.kaf, 4), (kaf.kaf, 256), (kaf.kaf, 4096), (kaf.naive, 256)],
                         ids=["4", "256", "4096", "naive"])
def test_it_is_the_formula_of_each_neuron_at_any_width(evaluate, units):
    """A kernel of the norm of the whole vector is 0 from some 50 neurons on, value and gradient. Here a neuron knows nothing of others."""
    s, alpha, gamma, points, pull = given("paper", 7, units)
    value, (to_s, to_alpha, to_gamma) = _gradients(evaluate, s, alpha, gamma, points, pull)
    f, slope, kernel, by_gamma = formula(s, alpha, gamma, points)
    pull = np.asarray(pull, np.float64)
    np.testing.assert_allclose(value, f, atol=2e-6)
    np.testing.assert_allclose(to_s, pull * slope, atol=1e-5)
    np.testing.assert_allclose(to_alpha, np.einsum("ru,riu->iu", pull, kernel), atol=1e-5)
    np.testing.assert_allclose(to_gamma, (pull * by_gamma).sum(0), atol=1e-5)
    for gradient in (to_s, to_alpha, to_gamma):
        assert np.mean(np.abs(gradient) > 1e-4) > 0.5


def _gradients(evaluate, s, alpha, gamma, points, pull):
    def total(s, alpha, gamma):
        value = evaluate(s, alpha, gamma, points)
        return jnp.sum(value * pull), value

    grads, value = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(s, alpha, gamma)
    return value, grads


@pytest.mark.parametrize("shape", [(3,), (33, 3), (5, 13, 3)], ids=str)
def test_fused_is_naive_whatever_the_batch(shape):
    """Numbers of rows that the parts of a batch do not divide; axes of time."""
    rng = np.random.default_rng(1)
    _, alpha, gamma, points, _ = given("torch", 2, 3)
    s, pull = (jnp.asarray(rng.normal(size=shape) * 3, jnp.float32) for _ in range(2))
    (a, grads), (b, wanted) = (_gradients(f, s, alpha, gamma, points, pull) for f in (kaf.kaf, kaf.naive))
    np.testing.assert_allclose(a, b, atol=2e-6)
    for x, y in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-5)


@pytest.mark.usefixtures("optimised")
def test_fused_holds_no_kernel_values():
    """Temporary memory of the gradient, as compiled for real: less than half a [batch, units, size], of which the naive formula holds
    several."""
    s, alpha, gamma, points, pull = given("paper", 1024, 64)

    def held(evaluate):
        f = jax.jit(jax.grad(lambda s, a, g: jnp.sum(jnp.sin(evaluate(s, a, g, points)) * pull), (0, 1, 2)))
        return f.lower(s, alpha, gamma).compile().memory_analysis().temp_size_in_bytes

    kernels = 4 * 1024 * 64 * 20
    assert held(kaf.naive) > 2 * kernels
    assert held(kaf.kaf) < kernels / 2


def test_beyond_the_dictionary_it_is_dead():
    """Value and gradient are 0 there and finite everywhere, however far; with the bypass it is a line."""
    s = jnp.asarray([[0.0, 6.5, -6.5, 1e4, -1e30, np.inf]], jnp.float32).T
    for bypass in (False, True):
        module = KAF(bypass=bypass)

        def look(s, module=module):
            params = module.init(jax.random.key(0), s)
            return module.apply(params, s), jax.grad(lambda s: jnp.sum(module.apply(params, s)))(s)

        value, slope = jax.jit(look)(s[1:5])
        np.testing.assert_allclose(slope, np.full((4, 1), float(bypass)), atol=1e-4)
        np.testing.assert_allclose(value, bypass * s[1:5], rtol=1e-6, atol=1e-4)
    assert np.asarray(beyond(s, 3.0)).ravel().tolist() == [False, True, True, True, True, True]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_fit_to_elu_has_the_measured_error(preset):
    """Largest error over 2001 points of the dictionary's range, in float64."""
    p = PRESETS[preset]
    s = np.linspace(-p.bound, p.bound, 2001)
    f = formula(s[:, None], ridge(p, TARGETS["elu"])[:, None], np.array([p.gamma]), p.points)[0][:, 0]
    assert np.abs(f - TARGETS["elu"](s)).max() == pytest.approx(ELU_ERRORS[preset], rel=0.05)


@pytest.mark.parametrize("start", [name for name in INITS if name != "random"])
@pytest.mark.parametrize("bypass", [False, True], ids=["", "bypass"])
def test_a_fit_is_near_its_target(start, bypass):
    """With the bypass as without it, and as the module computes it; document 000 asks for 0.05."""
    module = KAF(start=start, bypass=bypass)
    s = jnp.linspace(-3, 3, 301)[:, None] * jnp.ones((1, 2))
    value = jax.jit(lambda s: module.init_with_output(jax.random.key(0), s)[0])(s)
    np.testing.assert_allclose(value, TARGETS[start](np.asarray(s, np.float64)), atol=0.02 if start == "elu" else 0.05)


@pytest.mark.parametrize(("preset", "moved"), [("paper", 0.17), ("torch", 0.014), ("keras", 0.45)])
def test_a_fit_in_float32_is_another(preset, moved):
    """Condition numbers of 5e4 to 5e5: which is why it is solved in float64."""
    exact, rough = (ridge(PRESETS[preset], TARGETS["elu"], dtype) for dtype in (np.float64, np.float32))
    assert moved / 3 < np.abs(exact - rough).max() < 3 * moved


def test_presets_are_those_published():
    spacing = {"paper": 6 / 19, "torch": 8 / 19, "keras": 6 / 19}
    inverse = {"paper": 6, "torch": 8, "keras": 8}
    for name, preset in PRESETS.items():
        assert preset.gamma == pytest.approx(1 / (inverse[name] * spacing[name] ** 2))
        assert np.diff(preset.points) == pytest.approx(np.full(19, spacing[name]))
    # What random coefficients make of N(0, 1) inputs, by quadrature of sum_i k_i^2: 0.05 shrinks more than tenfold, 0.8 amplifies.
    s = np.linspace(-8, 8, 4001)
    normal = np.exp(-(s**2) / 2) / np.exp(-(s**2) / 2).sum()
    deviation = {name: p.std * np.sqrt(normal @ np.exp(-2 * p.gamma * (s[:, None] - p.points[None]) ** 2).sum(1))
                 for name, p in PRESETS.items()}
    assert deviation == pytest.approx({"paper": 0.52, "torch": 1.49, "keras": 0.094}, rel=0.02)


def test_a_trained_gamma_begins_at_the_presets_and_stays_positive():
    s = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
    fixed, (value, params) = (jax.jit(functools.partial(KAF(gamma=gamma).init_with_output, jax.random.key(0)))(s)
                              for gamma in ("fixed", "trained"))  # fmt: skip
    assert set(params["params"]) == {"alpha", "rho"}
    np.testing.assert_allclose(value, fixed[0], atol=1e-4)

    @jax.jit
    def look(params):
        f = lambda p: KAF(gamma="trained").apply({"params": p}, s)  # noqa: E731
        return f(params), jax.grad(lambda p: jnp.sum(jnp.square(f(p))))(params)

    assert all(bool(jnp.all(leaf != 0)) for leaf in jax.tree.leaves(look(params["params"])[1]))
    alpha = params["params"]["alpha"]  # at a gamma that is nearly 0, f is the sum of its coefficients
    np.testing.assert_allclose(look({"alpha": alpha, "rho": jnp.full(5, -50.0)})[0], np.broadcast_to(alpha.sum(0), (6, 5)), atol=1e-4)


def test_random_coefficients_differ_by_neuron_and_key():
    s = jnp.zeros((1, 300))
    one, other = (KAF(start="random").init(jax.random.key(key), s)["params"]["alpha"] for key in (0, 1))
    assert one.std() == pytest.approx(0.3, rel=0.05)
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.05


def test_two_dimensions_pair_channel_i_with_i_plus_half():
    """Against a float64 sum over 10 x 10 points, gradients by finite differences of it; a channel moves one output and no other."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
    module = KAF2D()
    params = module.init(jax.random.key(0), x)["params"]
    assert params["alpha"].shape == (10, 10, 3)
    points, gamma = np.linspace(-3, 3, 10), 1 / (4 * (6 / 9) ** 2)

    def wanted(x, alpha):
        near = np.exp(-gamma * (x[:, None] - points[None, :, None]) ** 2)
        return np.einsum("niu,iju,nju->nu", near[..., :3], alpha, near[..., 3:])

    alpha = np.asarray(params["alpha"], np.float64)
    np.testing.assert_allclose(module.apply({"params": params}, x), wanted(np.asarray(x, np.float64), alpha), atol=1e-6)
    exact = np.asarray(x, np.float64)
    slopes = jax.jit(jax.jacobian(lambda x: module.apply({"params": params}, x)))(x)
    for channel in range(6):
        step = np.zeros((5, 6))
        step[:, channel] = 1e-6
        rise = (wanted(exact + step, alpha) - wanted(exact - step, alpha)) / 2e-6
        found = np.stack([slopes[i, :, i, channel] for i in range(5)])
        np.testing.assert_allclose(found, rise, atol=1e-4)
        assert np.all(found[:, [unit for unit in range(3) if unit != channel % 3]] == 0)
    with pytest.raises(UserError, match="found 5 channels; accepted: an even number"):
        module.init(jax.random.key(0), x[:, :5])


@pytest.mark.parametrize(("change", "said"), [
    ({"preset": "tf"}, "config key kaf.preset: found 'tf'; accepted: paper, torch, keras"),
    ({"init": "selu"}, "config key kaf.init: found 'selu'; accepted: tanh, elu, gelu, identity, random"),
    ({"gamma": "free"}, "config key kaf.gamma: found 'free'; accepted: fixed, trained"),
])  # fmt: skip
def test_a_config_that_is_refused(change, said):
    with pytest.raises(UserError) as stop:
        KAFConfig(**change)
    assert str(stop.value) == said
