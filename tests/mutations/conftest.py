"""What checks of the mutants share, made before a fault is planted; and programs compiled with little optimisation."""

import jax
import pytest

from jaxdistill.data import images
from jaxdistill.models import classifier
from tests.data.test_sequences import ragged  # noqa: F401  (a fixture)
from tests.invariants import test_dcal as dcal_cases
from tests.models.test_readout import whole  # noqa: F401
from tests.recipes.conftest import job, other  # noqa: F401
from tests.training.test_checkpoint import two  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Small programs are kept too."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def plain_vit(tmp_path_factory) -> str:
    """The folder of a ViT of two blocks, and six classes."""
    data = images.ImageConfig(**dcal_cases.DATA | dict(task="classification", classes=6, test=0.0, test_per_class=4))
    model = classifier.describe(classifier.ModelConfig(**dcal_cases.MODEL | dict(depth=2)), "teacher", image=(16, 16), channels=1,
                                classes=images.load(data).classes)
    folder = tmp_path_factory.mktemp("vit") / "teacher"
    model.save(jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(5))), folder)
    return str(folder)
