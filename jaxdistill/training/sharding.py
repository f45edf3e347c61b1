"""The mesh, and regex rules -> NamedSharding."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdistill import UserError
from jaxdistill.training.optim import path_name

AXES = ("data", "fsdp", "model")
BATCH = PartitionSpec(("data", "fsdp"))  # examples are split over both: fsdp shards the parameters beside the data


def make_mesh(shape: tuple[int, int, int]) -> Mesh:
    """(data, fsdp, model) over the devices of all processes; one entry may be -1 (whatever is left). A smaller product
    takes the first devices."""
    devices = jax.device_count()
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if len(shape) != 3 or any(type(size) is not int or size == 0 or size < -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f"mesh: found {shape}; accepted: (data, fsdp, model), at most one of them -1")
    known = math.prod(size for size in shape if size > 0)
    if -1 in shape and devices % known == 0:
        shape = tuple(devices // known if size == -1 else size for size in shape)
    used = math.prod(shape)
    if not 0 < used <= devices or (used < devices and jax.process_count() > 1):
        raise UserError(f"mesh: found {shape} on {devices} device(s); accepted: sizes whose product is {devices}")
    # Auto on every axis: the default (Explicit) breaks Linen's Embed.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:used])


def shardings(tree: Any, rules: tuple[tuple[str, PartitionSpec], ...], mesh: Mesh) -> Any:
    """A tree like `tree` (parameters, moments, EMA, a whole state) with the NamedSharding of each leaf: the first
    rule whose regex is found in the leaf's path, else replicated."""

    def place(path, leaf):
        name = path_name(path)
        spec = rule(rules, name)
        shape = getattr(leaf, "shape", ())
        for axis, names in enumerate(spec):
            parts = math.prod(mesh.shape[one] for one in ((names,) if isinstance(names, str) else names or ()))
            if axis >= len(shape) or shape[axis] % parts:
                raise UserError(
                    f"mesh: found {tuple(mesh.shape.values())}, which cuts axis {axis} of {name} {shape} into {parts}; "
                    "accepted: fsdp and model sizes that divide the widths"
                )
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(place, tree)


def rule(rules: tuple[tuple[str, PartitionSpec], ...], name: str) -> PartitionSpec:
    """How the leaf at the path `name` is cut: by the first rule whose regex is found in it."""
    return next((spec for regex, spec in rules if re.search(regex, name)), PartitionSpec())


def gathering(rules: tuple[tuple[str, PartitionSpec], ...], mesh: Mesh) -> Callable:
    """tree -> the tree with its leaves whole along fsdp, as the step computes with them; traced.

    Left to itself, XLA may compute with the shards instead, and on meshes of all three axes its partitioner then drops an
    all-reduce: wrong gradients, without a word (openxla/xla#40034)."""

    def whole(place: NamedSharding) -> NamedSharding:
        names = [(name,) if isinstance(name, str) else name or () for name in place.spec]
        return NamedSharding(mesh, PartitionSpec(*(tuple(one for one in group if one != "fsdp") or None for group in names)))

    def gather(tree):
        places = jax.tree.map(whole, shardings(tree, rules, mesh))
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, places)

    return gather if mesh.shape["fsdp"] > 1 else lambda tree: tree


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def check_batch(batch: int, micro: int, mesh: Mesh) -> None:
    """The batch must divide by micro-batches x data shards, and these by the processes."""
    shards, processes = mesh.shape["data"] * mesh.shape["fsdp"], jax.process_count()
    if shards % processes:
        raise UserError(f"mesh: found {tuple(mesh.shape.values())}, whose {shards} data shard(s) cannot be divided among {processes} "
                        "processes; accepted: data x fsdp a multiple of them, as each reads its own part of the batch")
    if micro < 1 or batch < 1 or batch % (micro * shards):
        raise UserError(
            f"train.batch: found {batch} with train.micro {micro} and {shards} data shard(s); "
            f"accepted: a multiple of {max(micro, 1) * shards}"
        )


def replicate(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Into a sharding of all processes, each of which has the whole leaf, or its part of it already. What is this process's alone goes by
    the host: where each process has one device, JAX 0.10.2's device_put makes an array of it that computes and cannot be saved."""
    alone = jax.process_count() > 1 and isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    return jax.device_put(np.asarray(leaf) if alone else leaf, sharding)


def put(tree: Any, places: Any) -> Any:
    """Copies every leaf into its sharding. The copy is real, never an alias: donated state must own its
    memory, and device_put may alias also where it is told not to."""
    placed = jax.tree.map(place, tree, places)
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=places)(placed)


def global_batch(batch: dict, sharding: NamedSharding) -> dict:
    """This process's slice of a batch (numpy) -> arrays over the whole mesh."""
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(value: int) -> int:
    """The largest of all processes' values."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(jnp.asarray(value)).max())
