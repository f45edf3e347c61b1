"""The cases: each shipped language recipe, and the toy; and the folders that they share."""

import pytest

from tests.recipes.conftest import job, other  # noqa: E402, F401  (fixtures)


@pytest.fixture(scope="module", autouse=True)
def quiet_router():
    """Without noise on its gate: each micro-batch draws its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxdistill.models.router.NOISE", 0.0)
        yield
