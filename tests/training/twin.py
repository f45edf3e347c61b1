"""One of two processes of four devices: python -m tests.training.twin PORT INDEX WORKDIR [signal]."""

import signal
import sys

from tests import conftest  # noqa: F401  (before JAX: compiled programs shared)

# isort: split
import jax

port, index, workdir, *more = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index), initialization_timeout=60)

from jaxdistill.training import loop  # noqa: E402
from tests import jobs  # noqa: E402

if more and index == "1":  # one machine of the two is told to stop
    old = loop.sharding.global_batch
    seen = []

    def global_batch(batch, place):
        seen.append(1)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGTERM)
        return old(batch, place)

    loop.sharding.global_batch = global_batch

config = jobs.toy() if more else jobs.pair()
config.mesh = (4, 2, 1)
config.cache = f"{workdir}-cache"
try:
    loop.run(config, workdir)
except loop.Interrupted as stop:
    sys.exit(stop.code)
