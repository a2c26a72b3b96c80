"""Attention's kernels on a mesh: they are nothing that XLA's partitioner could cut."""

import jax
from jax.sharding import PartitionSpec as P


def on_shards(function, mesh, q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT):
  """function on each device's rows (the batch axes) and heads ('tensor'); without a mesh, or on one device, of all."""
  inputs = q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT
  if mesh is None or mesh.size == 1:
    return function(*inputs)
  rows = ('replica', 'fsdp', 'expert')
  heads_spec = P(rows, None, 'tensor', None)
  specs = (heads_spec, heads_spec, heads_spec, P(rows, None))
  return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=heads_spec, check_vma=False)(*inputs)
