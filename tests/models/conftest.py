"""What tests of models share."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick():
    """Compile with little optimisation: programs of a toy's size compile for longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
