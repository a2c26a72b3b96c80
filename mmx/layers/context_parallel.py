"""A sequence split over chips: what the mixers' shards tell each other over the mesh axis 'context'.

Shard i of n holds the tokens i*T to (i+1)*T of each row, T = S/n. What a mixer then needs from the others:

  full       keys and values of the whole row, gathered: with few kv heads they are small. M2's layer at S = 196,608 has
             2 * 8 * 128 * 196,608 * 2 bytes = 805 MB a row, held while one layer is at work. Of queries in order the
             last shard would have nearly all the work, as the first keys are everybody's; so half of them are swapped:
             shard i works on the i-th and the i-th but last of 2n slices (`swap`), which see 2n + 1 slices whatever i.
  sliding    the window - 1 tokens before its own, passed on from shard to shard; all of them where there are sinks,
             which may stand anywhere.
  lightning  the state before its own tokens. States add up: a shard's part of the state is one matrix per head, and all
             shards' are gathered and summed with their decays (`add_state_before`).
  msa        keys, values and index keys of the whole row, gathered; a query's work is the same wherever it stands.
  key shift  the last token of the shard before.

What follows a token (MTP) is of ids, four bytes a token, and left to XLA's partitioner. No array is [S, S].

Letters: B rows, T tokens of a shard, S of a row, n shards, H heads, K kv heads, Dh head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec as P

from mmx import sharding
from mmx.config import ConfigError
from mmx.kernels_pallas import api
from mmx.kernels_pallas.chunks import Part

AXIS = 'context'


# ----------------------------------------------------------------------------------------------------------------------
# mixers


def attend(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, *, mesh, **choice):
  """`api.attend` on any mesh."""
  if ways(mesh) == 1:
    return api.attend(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, mesh=mesh, **choice)

  def shard(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT):
    T = q_BTHDh.shape[1]
    k_BSKDh, v_BSKDh, segment_ids_BS = map(gather, (k_BTKDh, v_BTKDh, segment_ids_BT))
    part = Part(swapped_slots(ways(mesh), T), jax.lax.axis_index(AXIS), segment_ids_BS)
    segment_ids_BT = jnp.take(segment_ids_BS, part.slots_T, axis=1)
    out_BTHDh = api.attend(swap(q_BTHDh, ways(mesh)), k_BSKDh, v_BSKDh, segment_ids_BT, part=part, **choice)
    return swap(out_BTHDh, ways(mesh), back=True)

  return sharded(shard, mesh, q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT)


def slide(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, positions_BT, *, mesh, window, sink_tokens, **choice):
  """`api.sliding` on any mesh."""
  sight = functools.partial(api.sliding, window=window, sink_tokens=sink_tokens, **choice)
  if ways(mesh) == 1:
    return sight(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, positions_BT, mesh=mesh)

  def shard(q_BTHDh, *own):
    T = q_BTHDh.shape[1]
    if sink_tokens:
      return sight(q_BTHDh, *map(gather, own), start=jax.lax.axis_index(AXIS) * T)
    count = min(window - 1, (ways(mesh) - 1) * T)
    # Before the row's first token there is nothing: a segment that no query has.
    fills = 0, 0, -1, -1
    every = (jnp.concatenate([before(a, count, ways(mesh), fill), a], axis=1) for a, fill in zip(own, fills))
    return sight(q_BTHDh, *every, start=count)

  return sharded(shard, mesh, q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, positions_BT)


def one_before(x_BTD, mesh):
  """x[:, t - 1], zeros for the row's first token. XLA's partitioner would turn rows over to all shards and back."""
  shift = lambda x_BTD, first_B1D: jnp.concatenate([first_B1D.astype(x_BTD.dtype), x_BTD[:, :-1]], axis=1)
  if ways(mesh) == 1:
    return shift(x_BTD, jnp.zeros_like(x_BTD[:, :1]))
  rows, tokens = sharding.spec_of(('batch', 'length'), x_BTD.shape[:2], mesh)
  shard = lambda x_BTD: shift(x_BTD, before(x_BTD, 1, ways(mesh), 0))
  spec = P(rows, tokens, None)
  return sharding.on_shards(shard, mesh, (spec,), spec)(x_BTD)


def one_after(x_BTD, mesh):
  """x[:, t + 1], zeros for the row's last token."""
  shift = lambda x_BTD, last_B1D: jnp.concatenate([x_BTD[:, 1:], last_B1D], axis=1)
  if ways(mesh) == 1:
    return shift(x_BTD, jnp.zeros_like(x_BTD[:, :1]))
  rows, tokens = sharding.spec_of(('batch', 'length'), x_BTD.shape[:2], mesh)
  back = [(i + 1, i) for i in range(ways(mesh) - 1)]  # who is sent nothing has zeros
  shard = lambda x_BTD: shift(x_BTD, jax.lax.ppermute(x_BTD[:, :1], AXIS, back))
  spec = P(rows, tokens, None)
  return sharding.on_shards(shard, mesh, (spec,), spec)(x_BTD)


# ----------------------------------------------------------------------------------------------------------------------
# mixers, within a shard_map


def add_state_before(o_BTHDh, q_BTHDh, state_BHDhDh, slopes_H, segment_ids_BT, shards):
  """Lightning's output where the shards before count too.

  Args:
    o_BTHDh, state_BHDhDh: of this shard's tokens alone, begun with an empty state; see `api.lightning`.

  The state before shard j is the sum over the shards i < j that end in the document D that all before j end in, of
  exp(-slope * (D's tokens between them)) times their states. It reaches j's tokens of D.
  """
  count_BT = jnp.cumsum(segment_ids_BT > 0, axis=1, dtype=jnp.int32)
  last_B = jnp.max(segment_ids_BT, axis=1)  # ids of a row ascend; 0 where all is padding
  of_all = functools.partial(jax.lax.all_gather, axis_name=AXIS)
  states_nBHDhDh, count_nB, last_nB = map(of_all, (state_BHDhDh, count_BT[:, -1], last_B))
  earlier_n1 = (jnp.arange(shards) < jax.lax.axis_index(AXIS))[:, None]
  count_nB = jnp.where(earlier_n1, count_nB, 0)
  document_B = jnp.max(jnp.where(earlier_n1, last_nB, 0), axis=0)
  between_nB = jnp.sum(count_nB, axis=0)[None] - jnp.cumsum(count_nB, axis=0)
  reaches_nB = earlier_n1 & (last_nB == document_B[None]) & (document_B > 0)[None]

  slopes_H = jax.lax.stop_gradient(slopes_H)
  fade = lambda steps: jnp.exp(jnp.multiply.outer(steps.astype(jnp.float32), -slopes_H))
  weights_nBH = jnp.where(reaches_nB[..., None], fade(between_nB), 0)
  before_BHDhDh = jnp.einsum('nbh,nbhde->bhde', weights_nBH, states_nBHDhDh, precision='float32')
  into_BTH = jnp.where((segment_ids_BT == document_B[:, None])[..., None], fade(count_BT), 0)
  into_BTH = jnp.where((document_B > 0)[:, None, None], into_BTH, 0)
  q_BTHDh = q_BTHDh.astype(jnp.float32) * into_BTH[..., None]
  added_BTHDh = jnp.einsum('bthd,bhde->bthe', q_BTHDh, before_BHDhDh, precision='float32')
  return (o_BTHDh + added_BTHDh).astype(o_BTHDh.dtype)


def whole_rows(mesh, segment_ids_BT, *keys):
  """What belongs to the keys, of whole rows, and which part of these the shard's own tokens are: None where all."""
  if ways(mesh) == 1:
    return None, *keys
  T = segment_ids_BT.shape[1]
  slots_nT = np.arange(ways(mesh) * T, dtype=np.int32).reshape(-1, T)
  return Part(slots_nT, jax.lax.axis_index(AXIS), gather(segment_ids_BT)), *map(gather, keys)


# ----------------------------------------------------------------------------------------------------------------------
# the mesh


def ways(mesh: Mesh | None) -> int:
  """Over how many shards a row's tokens are split."""
  return 1 if mesh is None else mesh.shape[AXIS]


def check(mesh: Mesh | None, T: int, cached: bool) -> None:
  """Refuses what cannot be split: rows that do not divide, and caches, which hold whole sequences.

  Raises:
    ConfigError: either, in one line.
  """
  n = ways(mesh)
  if n > 1 and cached:
    raise ConfigError(f'mesh.context = {n}: generation holds whole sequences; set mesh.context = 1')
  if T % n:
    raise ConfigError(f'a row of {T} tokens (data.seq_len) does not divide by mesh.context = {n}')


def sharded(function, mesh: Mesh, q_BTHDh, k_BTKDh, *rest):
  """function on each chip's rows, tokens and heads -> [B, T, H, Dh]; inputs are [B, T, heads, Dh] or [B, T]."""
  rows, tokens, heads = sharding.spec_of(('batch', 'length', 'kv_heads'), k_BTKDh.shape[:3], mesh)
  inputs = q_BTHDh, k_BTKDh, *rest
  of_heads = P(rows, tokens, heads, None)
  specs = tuple(of_heads if a.ndim == 4 else P(rows, tokens) for a in inputs)
  return sharding.on_shards(function, mesh, specs, of_heads)(*inputs)


# ----------------------------------------------------------------------------------------------------------------------
# what travels


def gather(x_BT):
  """[B, T, ...] of every shard -> [B, S, ...].

  By a leading axis: the TPU compiler scatters the sum of gradients over that, where over T it gives every shard the
  whole sum, twice the bytes.
  """
  x_nBT = jax.lax.all_gather(x_BT, AXIS)
  return jnp.moveaxis(x_nBT, 0, 1).reshape(x_BT.shape[0], -1, *x_BT.shape[2:])


def before(x_BT, count, shards, fill):
  """The `count` tokens before the shard's own, [B, count, ...]; `fill` before the row's first."""
  T = x_BT.shape[1]
  index, pieces, missing = jax.lax.axis_index(AXIS), [], count
  for hop in range(1, -(-count // T) + 1):
    size = min(missing, T)
    come = jax.lax.ppermute(x_BT[:, T - size :], AXIS, [(i, i + hop) for i in range(shards - hop)])
    pieces.insert(0, jnp.where(index >= hop, come, fill))
    missing -= size
  return jnp.concatenate(pieces, axis=1) if pieces else x_BT[:, :0]


def swapped_slots(shards, T):
  """int32 numpy [n, T]: where the tokens that `swap` brings to each shard stand in the row."""
  if T % 2:
    return np.arange(shards * T, dtype=np.int32).reshape(shards, T)
  slices_n2 = np.stack([_places(shards, odd) for odd in (0, 1)], axis=1)
  return (slices_n2[:, :, None] * (T // 2) + np.arange(T // 2)).reshape(shards, T).astype(np.int32)


def swap(x_BT, shards, back=False):
  """Slices i and 2n-1-i of 2n to shard i, the even one first, and back; nothing moves where T is odd."""
  if x_BT.shape[1] % 2:
    return x_BT
  halves = []
  for odd, half_BT in enumerate(jnp.split(x_BT, 2, axis=1)):
    pairs = [(slice_ // 2, shard) for shard, slice_ in enumerate(_places(shards, odd))]
    halves.append(jax.lax.ppermute(half_BT, AXIS, [pair[::-1] for pair in pairs] if back else pairs))
  return jnp.concatenate(halves, axis=1)


def _places(shards, odd):
  """Of slices i and 2n-1-i, the even or the odd one, for each shard i."""
  return [i if i % 2 == odd else 2 * shards - 1 - i for i in range(shards)]
