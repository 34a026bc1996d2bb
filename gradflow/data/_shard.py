"""Data that several devices share."""

from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gradflow._checks import check_choice, check_count, fail
from gradflow.problems import EmpiricalRisk


def shard(
    problem: EmpiricalRisk, mesh: Mesh, *, axis: str | None = None, chunk_size: int | None = None
) -> EmpiricalRisk:
    """The same problem, with its inputs spread over the devices of a mesh.

    Every device predicts its own samples, in chunks of its own; a gradient, and a product with the Hessian, takes one
    sum over the devices. Parameters are on all of them, and so are the targets. `solve`, `iterate` and observables need
    to know nothing of it.

    **Arguments**

    - `problem`: an `EmpiricalRisk`. `mesh`: as of `jax.make_mesh((8,), ("data",))`.
    - `axis`: name of the axis of the mesh that the samples are spread over; the first if `None`.
    - `chunk_size`: samples that one device predicts at once; that of the problem if `None`, all if it has none.

    **Raises** `ValueError` for another kind of problem or mesh, an unknown axis, and a `chunk_size` below one.

    **Warns** where the devices do not divide the number of samples: the last sample is copied to fill them, and what is
    predicted for the copies is dropped.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), loss=gf.losses.square, predict=lambda w, x: x @ w)
    >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    >>> float(gf.data.shard(problem, mesh)(jnp.zeros(2)))
    0.5
    """
    if not isinstance(problem, EmpiricalRisk):
        raise fail("problem", "be a gradflow.EmpiricalRisk", f"of type {type(problem).__name__}")
    if not isinstance(mesh, Mesh):
        raise fail("mesh", 'be a mesh as of jax.make_mesh((8,), ("data",))', f"of type {type(mesh).__name__}")
    names = tuple(str(name) for name in mesh.axis_names)
    axis = names[0] if axis is None else axis
    check_choice("axis", axis, names)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    size = problem.chunk_size if chunk_size is None else chunk_size
    data = problem.x, problem.y
    # How what is computed from the samples is laid out is left to the compiler.
    free = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(names))
    place = NamedSharding(free, PartitionSpec(axis))
    return EmpiricalRisk(*data, problem.loss, problem.predict, problem.reduction, chunk_size=size, sharding=place)
