"""Attention's kernels on a mesh: they are nothing that XLA's partitioner could cut."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmx.kernels_pallas.chunks import places, sight

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


def on_documents(attend, q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BT, mesh=None, part=None):
  """attend(q, k, v, first, last) on each device's shards, of what a query sees of its document: `chunks.sight`.

  mesh: of whole rows. part: see `chunks.Part`; within a shard_map.
  """
  def shard(q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BT):
    slots_BT, (_, key_segments_BS) = places(segment_ids_BT, part)
    return attend(q_BTHDh, k_BSKDh, v_BSKDh, *sight(key_segments_BS, slots_BT))

  return on_shards(shard, mesh if part is None else None, q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BT)


def on_windows(attend, q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BS, window, mesh=None, start=None):
  """The same within a window. With `start`, within a shard_map, queries are those at the slots from there on."""
  def shard(q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BS):
    slots_T = jnp.arange(q_BTHDh.shape[1], dtype=jnp.int32) + (0 if start is None else start)
    slots_BT = jnp.broadcast_to(slots_T, q_BTHDh.shape[:2])
    return attend(q_BTHDh, k_BSKDh, v_BSKDh, *sight(segment_ids_BS, slots_BT, window))

  return on_shards(shard, mesh if start is None else None, q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BS)
