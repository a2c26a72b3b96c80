"""Sliding-window attention with sink tokens; both forms equal `reference.sliding`.

  chunked  anywhere: a scan over chunks of queries.
  splash   TPU: jax's Pallas splash attention, where there are neither sinks nor past keys; there also 'pallas' on TPU,
           `attention_tpu`, and 'hopper', `attention_gpu`.

A query at position i of its document sees positions j with i - W < j <= i, and those below Z, the document's first. A
chunk of c queries meets at most Z + W - 1 + c keys: the sinks, the W - 1 keys before it, which the scan carries from
chunk to chunk, and its own. Work is T (W + c + Z) Dh per head with c about W/4, whatever the length.

One set of sinks per chunk is exact although documents of a packed row start anywhere: a query whose sinks lie before
all other keys of its chunk belongs to the document in which the first of these keys stands, and so do its sinks.

Letters: B batch, T tokens, H query heads, K kv heads, G = H/K, Dh head dim, W window, Z sinks, P past keys, N chunks,
c queries of a chunk, R = G*c, S keys.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmx.kernels_pallas import splash
from mmx.kernels_pallas.chunks import join, kept, product, split
from mmx.kernels_pallas.shards import on_shards

NOWHERE = -1  # segment and position of a key that is not there


def sliding_chunked(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, positions_BT, window, sink_tokens=0, past=None,
                    start=None):
  """See `reference.sliding`, with the same arguments.

  With `start` (an int, traced or not) all but q are of S >= T tokens, and the queries are those from there on.

  Differentiated as it stands: jax.checkpoint makes a chunk's scores again in the backward pass, so that no scores are
  kept, only the carried keys: k and v, W/c times. On CPU that takes 0.4 to 0.8 of the time of a backward pass by hand
  from the logsumexp, which has to add into the gradients of all keys at every chunk.
  """
  B, T, H, Dh = q_BTHDh.shape
  K = k_BTKDh.shape[2]
  chunk = min(T, max(16, window // 4))
  every, P = (k_BTKDh, v_BTKDh, segment_ids_BT, positions_BT), 0
  if past:
    past = _in_order(past, every)
    start = P = past[0].shape[1]
    every = tuple(jnp.concatenate(pair, axis=1) for pair in zip(past, every))
  start = 0 if start is None else start
  own = (split(jax.lax.dynamic_slice_in_dim(a, start, T, axis=1), chunk) for a in every)
  own = tuple(a.swapaxes(2, 3) if a.ndim == 5 else a for a in own)
  q_NBKRDh = split(q_BTHDh * Dh**-0.5, chunk).swapaxes(2, 3).reshape(-1, B, K, H // K * chunk, Dh)

  carried = min(window - 1, every[0].shape[1] - 1)
  before = (_before(a, start, carried, fill) for a, fill in zip(every, (0, 0, NOWHERE, NOWHERE)))
  before = tuple(a.swapaxes(1, 2) if a.ndim == 4 else a for a in before)
  sinks = ()
  if sink_tokens:
    sinks = _sinks(every, P, start - carried + jnp.arange(q_NBKRDh.shape[0]) * chunk, sink_tokens)
  step = functools.partial(_one_chunk, window, sink_tokens)
  _, out_NBKRDh = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), before, (q_NBKRDh, own, sinks))
  out_NBHcDh = out_NBKRDh.reshape(-1, B, H, chunk, Dh)
  return kept(join(out_NBHcDh.swapaxes(2, 3), T))


def splash_unsupported(q_BTHDh, sink_tokens, start) -> str:
  """Why `sliding_splash` cannot serve these, in a few words; '' if it can."""
  if sink_tokens:
    return f'serves no sink tokens, got {sink_tokens}'
  if start is not None and not isinstance(start, int):
    return 'needs to know where the queries begin as the program is built'
  Dh = q_BTHDh.shape[3]
  return '' if Dh % 128 == 0 else f'needs head_dim in multiples of 128, got {Dh}'


def sliding_splash(q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BS, window, mesh=None, start=None, interpret=False):
  """Without sinks and past keys; rows over the batch axes and heads over 'tensor'. Dh must be a multiple of 128.

  The window is of slots: tokens of a document stand together, so slots tell how far apart they are as positions do.
  Rows are made up to whole blocks with a segment that no token has: queries and their keys behind, and keys in front
  where `start`, an int here, puts others before those of the queries.

  Args:
    interpret: runs the kernel on CPU, for tests.
  """
  T, begin = q_BTHDh.shape[1], start or 0
  # A block of 512 is worth its waste: by v5p's schedule, kernels forward and backward take 44 cycles a query and head
  # at W = 1024, of blocks of 256 75, of 128 164, of 1024 47 (v5e 40, 63, 120, 45; v6e 31, 54, 92, 32); at W = 128 they
  # take 30, 30 and 37. So rows are made up to blocks of 512 too, rather than cut into smaller ones that divide them.
  block = next((size for size in reversed(splash.BLOCKS) if size >= T), splash.BLOCKS[0])
  behind = -T % block
  first = begin + -(begin + T + behind) % block  # slot of the first query, with the keys put in front
  slots_T = np.arange(first, first + T + behind, dtype=np.int32)

  def shard(q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BS):
    every = zip((k_BSKDh, v_BSKDh, segment_ids_BS), (0, 0, NOWHERE))
    k_BSKDh, v_BSKDh, segment_ids_BS = (_padded(a[:, : begin + T], first - begin, behind, fill) for a, fill in every)
    kernel = splash.make_kernel(q_BTHDh.shape[2], slots_T[None], first + T + behind, block, window, interpret)
    segments = segment_ids_BS[:, first:], segment_ids_BS
    return splash.attend(kernel, _padded(q_BTHDh, 0, behind, 0), k_BSKDh, v_BSKDh, *segments)[:, :T]

  return on_shards(shard, mesh, q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BS)


def sliding_slots(q_BTHDh, k_BSKDh, v_BSKDh, slot_positions_BS, positions_BT, window, sink_tokens=0):
  """Few queries (decoding: one) against a cache that holds their own keys too; slots are in any order.

  Args:
    slot_positions_BS: int32, the position of the key in each slot, negative where there is none.
    positions_BT: int32, of the queries.
  """
  B, T, H, Dh = q_BTHDh.shape
  K = k_BSKDh.shape[2]
  q_BKRDh = (q_BTHDh * Dh**-0.5).reshape(B, T, K, H // K, Dh).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, Dh)
  seen_BTS = _in_sight(positions_BT, slot_positions_BS, window, sink_tokens) & (slot_positions_BS >= 0)[:, None]
  out_BKRDh = _attend(q_BKRDh, k_BSKDh.swapaxes(1, 2), v_BSKDh.swapaxes(1, 2), seen_BTS)
  return out_BKRDh.reshape(B, H, T, Dh).swapaxes(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# one chunk


def _one_chunk(window, sink_tokens, before, xs):
  """(keys, values, segments, positions) before the chunk, chunk -> (the same before the next), out [B, K, R, Dh]."""
  q_BKRDh, own, sinks = xs
  carried = before[2].shape[1]
  k_BKSDh, v_BKSDh, segment_ids_BS, positions_BS = (
      jnp.concatenate(parts, axis=axis)
      for parts, axis in zip(zip(*(part for part in (sinks, before, own) if part)), (2, 2, 1, 1))
  )
  same_BcS = own[2][:, :, None] == segment_ids_BS[:, None, :]
  seen_BcS = same_BcS & _in_sight(own[3], positions_BS, window, sink_tokens)
  out_BKRDh = _attend(q_BKRDh, k_BKSDh, v_BKSDh, seen_BcS)
  last = lambda a, axis: jax.lax.slice_in_dim(a, a.shape[axis] - carried, a.shape[axis], axis=axis)
  return (last(k_BKSDh, 2), last(v_BKSDh, 2), last(segment_ids_BS, 1), last(positions_BS, 1)), out_BKRDh


def _in_sight(query_BT, key_BS, window, sink_tokens):
  """bool [B, T, S], by positions in the document."""
  behind_BTS = query_BT[:, :, None] - key_BS[:, None, :]
  return (behind_BTS >= 0) & ((behind_BTS < window) | (key_BS < sink_tokens)[:, None, :])


def _attend(q_BKRDh, k_BKSDh, v_BKSDh, seen_BcS):
  """Softmax attention of scaled queries; R = G*c, as the heads of a group share keys."""
  B, c, S = seen_BcS.shape
  K, R = q_BKRDh.shape[1:3]
  scores = product(q_BKRDh, k_BKSDh, 3, 3).reshape(B, K, R // c, c, S)
  # Not -inf: a query sees itself, but a row of a batch that sits a decoding step out may see nothing.
  weights = jax.nn.softmax(jnp.where(seen_BcS[:, None, None], scores, -1e30), axis=-1).astype(v_BKSDh.dtype)
  return product(weights.reshape(B, K, R, S), v_BKSDh, 3, 2).astype(q_BKRDh.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# which keys a chunk gets


def _before(a_BS, start, count, fill):
  """The `count` before `start` along axis 1, with `fill` in front where there are fewer."""
  return jax.lax.dynamic_slice_in_dim(_padded(a_BS, count, 0, fill), start, count, axis=1)


def _padded(a_BS, front, behind, fill):
  """With so much of `fill` in front and behind along axis 1."""
  missing = ((0, 0), (front, behind)) + ((0, 0),) * (a_BS.ndim - 2)
  return jnp.pad(a_BS, missing, constant_values=fill)


def _in_order(past, new):
  """Past keys and values by position, those that are not there first; with the row's segment id and their positions."""
  k_BTKDh, v_BTKDh, segment_ids_BT, positions_BT = new
  k_BPKDh, v_BPKDh, positions_BP = past
  k_BPKDh, v_BPKDh = k_BPKDh.astype(k_BTKDh.dtype), v_BPKDh.astype(v_BTKDh.dtype)
  positions_BP = jnp.where(positions_BP < positions_BT[:, :1], positions_BP, NOWHERE)
  order_BP = jnp.argsort(positions_BP, axis=1)
  positions_BP = jnp.take_along_axis(positions_BP, order_BP, axis=1)
  segment_ids_BP = jnp.where(positions_BP < 0, NOWHERE, segment_ids_BT[:, :1])
  k_BPKDh, v_BPKDh = (jnp.take_along_axis(a, order_BP[:, :, None, None], axis=1) for a in (k_BPKDh, v_BPKDh))
  return k_BPKDh, v_BPKDh, segment_ids_BP, positions_BP


def _sinks(every, P, first_N, sink_tokens):
  """The sinks that each chunk does not hold anyway, as part of its keys: ([N, B, K, Z, Dh] twice, [N, B, Z] twice).

  Args:
    every: keys, values, segments and positions [B, P + T, ...], past and new.
    P: past keys, in order.
    first_N: where in `every` the keys of each chunk begin.
  """
  k_BSKDh, v_BSKDh, segment_ids_BS, positions_BS = every
  begin_N = jnp.maximum(first_N, 0)
  if P:  # one document: it begins behind the slots that are empty
    start_BN = jnp.sum(positions_BS[:, :P] < 0, axis=1, dtype=jnp.int32)[:, None] + jnp.zeros_like(begin_N)[None]
  else:
    start_BN = begin_N[None] - positions_BS[:, begin_N]
  slot_BNZ = start_BN[:, :, None] + jnp.arange(sink_tokens)[None, None, :]
  there_BNZ = (slot_BNZ >= 0) & (slot_BNZ < first_N[None, :, None])
  slot_BM = jnp.where(there_BNZ, slot_BNZ, 0).reshape(k_BSKDh.shape[0], -1)
  segment_ids_BNZ, positions_BNZ = (
      jnp.where(there_BNZ, jnp.take_along_axis(a, slot_BM, axis=1).reshape(slot_BNZ.shape), NOWHERE)
      for a in (segment_ids_BS, positions_BS)
  )
  k_NBKZDh, v_NBKZDh = (
      jnp.take_along_axis(a, slot_BM[:, :, None, None], axis=1)
      .reshape(*slot_BNZ.shape, *a.shape[2:]).transpose(1, 0, 3, 2, 4)
      for a in (k_BSKDh, v_BSKDh)
  )
  return k_NBKZDh, v_NBKZDh, segment_ids_BNZ.swapaxes(0, 1), positions_BNZ.swapaxes(0, 1)
