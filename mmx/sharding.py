"""Mesh and placement: one table says where each logical axis lives.

Mesh axes (mmx.config.MeshConfig): replica, fsdp, expert, tensor, context. Rows of a batch are split over the first
three, so that expert shards also hold tokens, and the tokens of a row over the last. Axis types are Auto: XLA
propagates, `constrain` pins, `jax.shard_map` is used where the communication is ours: of matrices here (`product`), of
tokens in mmx/layers/moe_transport.py and mmx/layers/context_parallel.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P

from mmx import config

AXES = config.MESH_AXES
BATCH_AXES = ('replica', 'fsdp', 'expert')

MESH_AXIS_OF = {
    'batch': BATCH_AXES,
    'length': 'context',
    'vocab': 'tensor',
    'embed': 'fsdp',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'experts': 'expert',
    'hidden': 'tensor',
    'hidden_rows': ('tensor', 'fsdp'),
    'head_dim': None,
    'layers': None,
    'norm': None,
    'router': None,
    None: None,
}
# Where a matrix is no small one, every chip of a group of experts, or of one that shares a sequence, would hold it
# again: 48 GB of M2's state and moments.
LARGE = 2**20  # elements, all layers together; what is smaller is not worth a gather of its own
MESH_AXIS_OF_LARGE = MESH_AXIS_OF | {
    'embed': ('fsdp', 'expert', 'context'), 'hidden_rows': ('tensor', 'fsdp', 'context'),
}
# Chips that work with the same experts keep a part of the rows of each on TPU, and on GPUs some of them whole. The other
# way round, libtpu holds all of them in float32 once more (14 GiB of M2 on 64 chips), and XLA on GPUs their gradients
# (26 GiB on 32), as it scatters them in an order of their own.
MESH_AXIS_OF_LARGE_ON_GPU = MESH_AXIS_OF_LARGE | {'experts': ('expert', 'fsdp', 'context')}


def build_mesh(mesh: config.MeshConfig, devices=None) -> Mesh:
  """A mesh with axes AXES over `devices` (default: all of them, or the first `mesh.num_devices`).

  Raises:
    ConfigError: the axis sizes do not multiply to the number of devices, or more are asked for than exist.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = config.resolve_mesh(mesh, len(devices))
  shape = tuple(sizes[axis] for axis in AXES)
  used = devices[: math.prod(shape)]
  if len(used) < len(devices) or used[0].platform == 'cpu':
    grid = np.array(used).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  return jax.make_mesh(shape, AXES, devices=used, axis_types=(AxisType.Auto,) * len(AXES))


def platform_of(mesh: Mesh | None) -> str:
  """'cpu', 'gpu' or 'tpu', read from the mesh: the host's own backend may differ when compiling ahead of time. Without a
  mesh, or of one without devices, 'cpu'."""
  return 'cpu' if mesh is None or isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform


def spec_of(logical_axes, shape, mesh: Mesh) -> P:
  """Mesh axes for one array. A dimension takes those of its axes that no dimension before it has, as many of them, from
  the first, as divide it; the rest leave it whole (norm scales, tiny models)."""
  spec, taken = [], set()
  table = MESH_AXIS_OF
  if math.prod(shape) >= LARGE:
    table = MESH_AXIS_OF_LARGE_ON_GPU if platform_of(mesh) == 'gpu' else MESH_AXIS_OF_LARGE
  for size, logical in zip(shape, logical_axes, strict=True):
    named = table[logical]
    axes = [a for a in ((named,) if isinstance(named, str) else named or ()) if mesh.shape[a] > 1 and a not in taken]
    while size % math.prod(mesh.shape[a] for a in axes):
      axes.pop()
    taken.update(axes)
    spec.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
  return P(*spec)


def tree_shardings(boxed_abstract, mesh: Mesh):
  """NamedShardings for a tree of ShapeDtypeStructs, some boxed with logical axes by `param`; the rest is replicated."""

  def place(leaf):
    if isinstance(leaf, nn.Partitioned):
      return NamedSharding(mesh, spec_of(leaf.names, leaf.value.shape, mesh))
    return NamedSharding(mesh, P())

  return jax.tree.map(place, boxed_abstract, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def batch_spec() -> P:
  """Placement of [B, T] arrays of a batch."""
  return P(BATCH_AXES, 'context')


def constrain(x, mesh: Mesh | None, *logical_axes):
  """Pins an activation's placement; free on one device."""
  if mesh is None or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec_of(logical_axes, x.shape, mesh)))


def on_shards(function, mesh: Mesh, in_specs, out_specs):
  """`jax.shard_map` of functions whose kernels declare no varying axes.

  A gradient is summed over the axes that a spec leaves out, which a CPU does by copying all of it even where there is one
  part to sum: axes of one part are named by every spec that names anything.
  """
  single = [axis for axis in mesh.axis_names if mesh.shape[axis] == 1]

  def complete(spec):
    named = jax.tree.leaves(tuple(spec))
    first, *others = spec or (None,)
    rest = [axis for axis in single if axis not in named]
    return P((*jax.tree.leaves(first), *rest), *others) if spec else spec

  is_spec = lambda node: isinstance(node, P)
  in_specs = jax.tree.map(complete, in_specs, is_leaf=is_spec)
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def token_axes(mesh: Mesh | None) -> tuple[str, ...]:
  """Axes of several parts over which the tokens of a batch are split."""
  return tuple(axis for axis in (*BATCH_AXES, 'context') if mesh is not None and mesh.shape[axis] > 1)


def on_tokens(function, mesh: Mesh, in_specs, out_specs):
  """`jax.shard_map` over the axes of the batch; what lies on 'tensor' is left to the partitioner."""
  manual = {*BATCH_AXES, 'context'}
  return jax.shard_map(
      function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=manual, check_vma=False
  )


def sum_of_shards(shape, dimension, mesh: Mesh):
  """(function, spec): within `on_tokens`, adds up the shards' arrays of that shape, and how the sum lies then.

  Large ones are scattered over a dimension that divides, as parameters of their size lie; others each shard gets whole.
  """
  axes = token_axes(mesh)
  if math.prod(shape) < LARGE or shape[dimension] % math.prod(mesh.shape[axis] for axis in axes):
    return functools.partial(jax.lax.psum, axis_name=axes), P()

  def scatter(total):
    for axis in axes:  # see `gathered`
      total = jax.lax.psum_scatter(total, axis, scatter_dimension=dimension, tiled=True)
    return total

  return scatter, P(*[axes if i == dimension else None for i in range(len(shape))])


def parts_of(names, shape, mesh: Mesh | None) -> P:
  """How the shards of `on_tokens` find a parameter: `spec_of` without the axes that are left to the partitioner."""
  axes = token_axes(mesh)
  spec = spec_of(names, shape, mesh) if axes else (None,) * len(shape)
  return P(*(tuple(axis for axis in jax.tree.leaves(named) if axis in axes) or None for named in spec))


def gathered(w, spec, held=()):
  """Within a `shard_map`, the whole of an array whose parts lie as `spec` says, but for what the axes `held` split.

  Axis by axis, and so is its gradient scattered: of a gather over all sides of a slice libtpu makes an all-reduce among
  zeros, which sends twice the bytes (in M2's step of 8K on 64 chips 217 GiB a chip instead of 183).
  """
  for dimension, named in enumerate(spec):
    for axis in reversed(jax.tree.leaves(named)):  # the last named lies closest
      if axis not in held:
        w = jax.lax.all_gather(w, axis, axis=dimension, tiled=True)
  return w


def product(x_BTX, w, names, mesh: Mesh | None):
  """Activations [B, T, *X] times a parameter [*X, *Y] of logical axes `names`, in x's dtype: [B, T, *Y].

  Where each shard of the tokens has a part of it, the parameter is `gathered`. Left to the partitioner, its gradient
  would be summed up whole on every chip.
  """
  w, X = cast(w, x_BTX.dtype), x_BTX.ndim - 2
  contract = lambda x, w: jax.lax.dot_general(x, w, ((range(2, x.ndim), range(X)), ((), ())))
  parts = parts_of(names, w.shape, mesh)
  if not any(parts):
    return contract(x_BTX, w)
  tokens = spec_of(('batch', 'length'), x_BTX.shape[:2], mesh)  # a few rows to generate from may not divide
  return on_tokens(lambda x, w: contract(x, gathered(w, parts)), mesh, (tokens, parts), tokens)(x_BTX, w)


def param(module: nn.Module, name: str, shape, axes, init):
  """Declares one float32 parameter: name, shape, logical axes and initializer on one line."""
  assert len(shape) == len(axes), (name, shape, axes)
  return module.param(name, nn.with_partitioning(init, axes), shape, np.float32)


def cast(w, dtype):
  """A float32 parameter in the dtype of the products, bfloat16 or float32, made where it is used and no earlier.

  XLA takes a plain cast of a layer's matrices out of the loop over the layers and holds those of all layers once more:
  6.5 GiB a chip where 64 share M2. A rounding to the same bits before the cast keeps it at its place.
  """
  if w.dtype == dtype:
    return w
  of = jnp.finfo(dtype)
  return jax.lax.reduce_precision(w, of.nexp, of.nmant).astype(dtype)


def fan_in_normal(fan_in: int, scale: float = 1.0):
  """Normal initializer of standard deviation scale / sqrt(fan_in); released models give only 0.02 = 1.1/sqrt(3072)."""
  return nn.initializers.normal(stddev=scale / math.sqrt(fan_in))
