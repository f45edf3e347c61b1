"""On which axes of the mesh the tokens of a loss are cut: for losses that let each device walk its own tokens."""

import jax
from jaxtyping import Array, Shaped

Axes = tuple[str, ...]


def cuts(tokens: Shaped[Array, "batch time *_"]) -> tuple[jax.sharding.AbstractMesh, Axes, Axes]:
    """(the mesh: the ambient one, or that of `tokens`; its axes that cut the batch; its axes that cut the positions): each
    axis cuts the first of both that it divides. Traced; nothing is cut where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        mesh = jax.typeof(tokens).sharding.mesh
    left, axes = list(tokens.shape[:2]), ([], [])
    for name, size in mesh.shape.items():
        which = next((which for which in (0, 1) if left[which] % size == 0), None)
        if size > 1 and which is not None and name not in mesh.manual_axes:
            left[which] //= size
            axes[which].append(name)
    return mesh, tuple(axes[0]), tuple(axes[1])
