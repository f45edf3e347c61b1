"""Eight CPU devices, strict rank promotion, shape checks, no hub, a cache of its own."""

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # programs of toys are compiled longer than they run; `optimised` is for the others
# Compiled programs are shared between tests, and with the commands that tests start. The folder is the user's own.
COMPILED = Path(tempfile.gettempdir()) / f"jaxdistill-tests-{os.getuid()}"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

pytest.register_assert_rewrite("tests.invariants.checks")  # before anything imports it
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # grain's workers ask

# Every shape annotation of these packages is checked whenever the tests call them.
jaxtyping.install_import_hook(["jaxdistill.losses", "jaxdistill.models", "jaxdistill.evaluators"], "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache folder of the session's own: no test, and no fixture that tests share, reads what a user's runs left, or leaves
    anything there."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture
def optimised():
    """Compiled as users' programs are: for a test of what a program holds, or one that runs for long."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
