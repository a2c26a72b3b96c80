"""Attention's kernels on a mesh: they are nothing that XLA's partitioner could cut."""

import math

import jax
from jax.sharding import PartitionSpec as P

ROWS = 'replica', 'fsdp', 'expert'


def on_shards(function, mesh, q_BTHDh, k_BTKDh, v_BTKDh, ids_BT, cached=False):
  """function on each device's rows (the batch axes) and heads ('tensor'); without a mesh, or on one device, of all.

  Where they are `cached`, keys and values are [B, K, S, Dh]. Axes that do not divide rows or kv heads have all of them.
  """
  inputs = q_BTHDh, k_BTKDh, v_BTKDh, ids_BT
  if mesh is None or mesh.size == 1:
    return function(*inputs)
  rows = ROWS
  while ids_BT.shape[0] % math.prod(mesh.shape[axis] for axis in rows):
    rows = rows[:-1]
  heads = 'tensor' if k_BTKDh.shape[1 if cached else 2] % mesh.shape['tensor'] == 0 else None
  queries = P(rows, None, heads, None)
  keys = P(rows, heads, None, None) if cached else queries
  specs = queries, keys, keys, P(rows, None)
  return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)(*inputs)
