"""Principal components and Tucker factors equal their definitions, and are of what they were fitted on alone."""

import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.data.reduction import fit_pca, fit_tucker


@pytest.fixture
def ragged():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(12, 12)) * np.geomspace(4, 0.1, 12)[:, None]
    return [(rng.normal(size=(t, 12)) @ mixing + 5).astype(np.float32).reshape(t, 4, 3) for t in (7, 3, 9, 5)]


@pytest.fixture
def equal(ragged):
    rng = np.random.default_rng(1)
    return [(x[:3] + rng.normal(size=(3, 1, 1))).astype(np.float32) for x in ragged]


def test_pca_is_the_singular_vectors_of_the_centred_frames(ragged):
    frames = np.concatenate(ragged).reshape(-1, 12).astype(np.float64)
    centred = frames - frames.mean(axis=0, keepdims=True)
    _, values, vectors = np.linalg.svd(centred, full_matrices=False)
    found = fit_pca(lambda: ragged, 3)
    got = np.concatenate([found.apply(x) for x in ragged])
    wanted = centred @ vectors[:3].T
    assert got.dtype == np.float32
    np.testing.assert_allclose(np.abs(got), np.abs(wanted), atol=1e-4)
    assert found.kept == pytest.approx([(values[:3] ** 2).sum() / (values**2).sum()])
    assert (found.width, found.frames) == (3, 0)
    np.testing.assert_allclose(got.mean(axis=0), 0, atol=1e-5)


def test_all_components_lose_nothing(ragged):
    found = fit_pca(lambda: ragged, 12)
    assert found.kept == pytest.approx([1])
    one, other = (np.linalg.norm(np.diff(y, axis=0), axis=1) for y in (found.apply(ragged[0]), ragged[0].reshape(7, 12)))
    np.testing.assert_allclose(one, other, rtol=1e-5)  # a rotation


def unfolding_vectors(tensor: np.ndarray, mode: int, rank: int) -> np.ndarray:
    unfolded = np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
    return np.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]


def signed(factor: np.ndarray) -> np.ndarray:
    largest = factor[np.abs(factor).argmax(axis=0), np.arange(factor.shape[1])]
    return factor * np.sign(largest)[None]


@pytest.mark.parametrize("ranks", [(2, 3, 2), (0, 2, 0), (0, 3, 1), (3, 0, 0)])
def test_tucker_is_the_hosvd_of_the_centred_tensor(equal, ranks):
    tensor = np.stack(equal).astype(np.float64)
    tensor -= tensor.mean(axis=(0, 1), keepdims=True)
    core = tensor
    for mode, rank in enumerate(ranks, start=1):
        if rank:
            factor = signed(unfolding_vectors(tensor, mode, rank))
            core = np.moveaxis(np.tensordot(core, factor, axes=(mode, 0)), -1, mode)
    found = fit_tucker(lambda: equal, ranks)
    got = np.stack([found.apply(x) for x in equal])
    assert got.shape == (4, core.shape[1], core.shape[2] * core.shape[3])
    np.testing.assert_allclose(got, core.reshape(got.shape), atol=1e-4)
    assert found.width == core.shape[2] * core.shape[3]
    assert found.frames == ranks[0]
    assert len(found.kept) == sum(rank > 0 for rank in ranks)


def test_tucker_of_a_tensor_of_low_rank_keeps_all_of_it():
    rng = np.random.default_rng(2)
    joints, axes = np.linalg.qr(rng.normal(size=(5, 2)))[0], np.linalg.qr(rng.normal(size=(3, 1)))[0]
    exact = [np.einsum("tab,ja,cb->tjc", rng.normal(size=(t, 2, 1)), joints, axes) for t in (4, 6)]
    found = fit_tucker(lambda: exact, (0, 2, 1))
    assert found.kept == pytest.approx([1, 1])
    for x in exact:
        np.testing.assert_allclose(np.linalg.norm(np.diff(found.apply(x), axis=0)), np.linalg.norm(np.diff(x, axis=0)), rtol=1e-5)


def test_tucker_of_features_has_two_modes(ragged):
    flat = [x.reshape(len(x), 12) for x in ragged]
    one, other = fit_tucker(lambda: flat, (0, 4)), fit_pca(lambda: flat, 4)
    for x in flat:
        np.testing.assert_allclose(one.apply(x), other.apply(x), atol=1e-4)


@pytest.mark.parametrize("fit", [lambda x: fit_pca(lambda: x, 4), lambda x: fit_tucker(lambda: x, (0, 3, 2))])
def test_the_fit_is_deterministic_and_a_frame_is_reduced_alike_wherever_it_stands(ragged, fit):
    first, again, backwards = fit(ragged), fit(ragged), fit(ragged[::-1])
    x = ragged[0]
    np.testing.assert_array_equal(first.apply(x), again.apply(x))
    np.testing.assert_allclose(first.apply(x), backwards.apply(x), atol=1e-4)
    np.testing.assert_allclose(first.apply(x)[2:4], first.apply(x[2:4]), atol=1e-5)


def test_constant_frames_are_no_division_by_zero():
    still = [np.ones((3, 4, 3), np.float32)] * 2
    for found in (fit_pca(lambda: still, 2), fit_tucker(lambda: still, (0, 2, 2))):
        assert (found.apply(still[0]) == 0).all()
        assert set(found.kept) == {1.0}


@pytest.mark.parametrize(("fit", "said"), [
    (lambda x: fit_pca(lambda: x, 13), "config key data.components: found 13; accepted: 1 to 12, the numbers of a frame"),
    (lambda x: fit_pca(lambda: x, 0), "config key data.components: found 0; accepted: 1 to 12"),
    (lambda x: fit_tucker(lambda: x, (0, 5, 3)), "config key data.ranks: found (0, 5, 3); accepted: one for each mode, at most (the"),
    (lambda x: fit_tucker(lambda: x, (0, 3)), "config key data.ranks: found (0, 3); accepted: one for each mode"),
    (lambda x: fit_tucker(lambda: x, ()), "config key data.ranks: found (); accepted: one for each mode"),
    (lambda x: fit_tucker(lambda: x, (0, 0, 0)), "config key data.ranks: found (0, 0, 0); accepted: one for each mode"),
    (lambda x: fit_tucker(lambda: x, (0, -1, 2)), "config key data.ranks: found (0, -1, 2)"),
    (lambda x: fit_tucker(lambda: x, (2, 2, 2)), "config key data.ranks: found (2, 2, 2), and sequences of 3 to 9 frames"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_one_line(ragged, fit, said):
    with pytest.raises(UserError) as caught:
        fit(ragged)
    assert str(caught.value).startswith(said)
