"""One of several processes that train together for a few steps: ``steps_child.py PORT COUNT INDEX``.

Prints loss and gradient norm of each step, as exact numbers; process 0 of one process is the reference.
"""

import json
import os
import sys


def main(port: str, count: int, index: int) -> None:
    """Joins the other processes and trains on this one's rows."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    devices = f"--xla_force_host_platform_device_count={8 // count}"
    os.environ["XLA_FLAGS"] = f"{devices} --xla_backend_optimization_level=0"
    import jax

    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", count, index)
    import numpy as np

    from tests.train.common import micro_config
    from train.data import make_loader
    from train.inputs import RandomTokens
    from train.loop import build
    from train.sharding import batch_sharding, make_mesh, put_batch, replicated

    config = micro_config(
        model__preset="holo", model__hd_dim=32, mesh__data=2, mesh__fsdp=2, mesh__seq=2, context_length=16
    )
    mesh = make_mesh(config.mesh)
    _, steps = build(config.model, config.optimizer, config.num_steps, mesh)
    key = np.asarray(jax.random.key_data(jax.random.key(0, impl="threefry2x32")))
    state = steps.init(jax.device_put(key, replicated(mesh)))
    loader = make_loader(
        RandomTokens(64, 16, 0),
        seed=0,
        global_batch_size=8,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=0,
    )
    curve = []
    for _ in range(3):
        state, metrics = steps.train(state, put_batch(next(loader), 2, batch_sharding(mesh)))
        curve.append((float(metrics.loss), float(metrics.grad_norm)))
    loader.close()
    print(json.dumps({"devices": jax.device_count(), "curve": curve}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
