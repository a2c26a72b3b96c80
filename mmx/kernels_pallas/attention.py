"""Full causal attention with packed segments, one form per platform, all equal to `reference.attention`.

  chunked  CPU (and anywhere): queries in chunks, each against its causal prefix only.
  cudnn    GPU: jax.nn.dot_product_attention's cuDNN kernel.
  splash   TPU: jax's Pallas splash attention, under shard_map when the mesh has several devices.
  pallas   TPU: `attention_tpu`, our own.
  hopper   `attention_gpu`, our own.

All but `cudnn` also serve the queries of a part of the rows against keys of whole ones (`chunks.Part`).

Letters: B batch, T tokens, H query heads, K kv heads, G = H/K, Dh head dim, c chunk of queries,
S keys a chunk sees, or of whole rows, or slots of a cache, R = G*c, s slots of a span, n parts, N chunks.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mmx.kernels_pallas import splash
from mmx.kernels_pallas.chunks import join, kept, product, split
from mmx.kernels_pallas.shards import on_shards

CHUNK = 64  # queries; smaller skips more of the future, larger makes better matrix products
SPAN = 256  # slots of a cache, or of keys of whole rows, read at once


@jax.custom_vjp
def attention_chunked(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT):
  """Each chunk of queries against its causal prefix only: T^2/2 work; keeps the output and one logsumexp a query.

  The backward pass makes the probabilities again from the logsumexp (FlashAttention, arXiv:2205.14135): two passes over
  the scores where differentiating a softmax takes five, and no [T, T] array is kept. 0.5 times the time on CPU of plain
  attention at T=256 with its gradient.
  """
  return _chunked_forward(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT)[0]


def _heads_first(x_BTHDh, K):
  """[B, T, K*G, Dh] -> [B, K, G, T, Dh]."""
  B, T, H, Dh = x_BTHDh.shape
  return x_BTHDh.reshape(B, T, K, H // K, Dh).transpose(0, 2, 3, 1, 4)


def _chunks(T):
  """(start, end) of each chunk; longer ones for long sequences, so that at most 32 are unrolled."""
  chunk = max(CHUNK, -(-T // 32))
  return [(start, min(start + chunk, T)) for start in range(0, T, chunk)]


def _keys_from_rows(x_BKRDh, weights_BKRS):
  """weights^T x, [B, K, S, Dh], by way of its transpose: XLA's CPU product contracts the first axis of a matrix
  several times slower than the last, and x is the small one to turn. The barriers keep it from being turned back."""
  x_BKDhR = jax.lax.optimization_barrier(jnp.swapaxes(x_BKRDh, 2, 3))
  return jnp.swapaxes(jax.lax.optimization_barrier(product(x_BKDhR, weights_BKRS, 3, 2)), 2, 3)


def _scores(q_BKRDh, k_BKSDh, segment_ids_BT, start, end):
  """Masked scores [B, K, G, c, S] of queries start..end (R = G*c rows: the heads of a group share keys)."""
  B, K, R, _ = q_BKRDh.shape
  c, S = end - start, end
  causal_cS = jnp.arange(start, end)[:, None] >= jnp.arange(S)[None, :]
  visible_BcS = causal_cS[None] & (segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, :S])
  scores = product(q_BKRDh, k_BKSDh, 3, 3).reshape(B, K, R // c, c, S)
  return jnp.where(visible_BcS[:, None, None], scores, -1e30)  # a query always sees itself: no row is all masked


def _chunked_forward(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT):
  B, T, H, Dh = q_BTHDh.shape
  K = k_BTKDh.shape[2]
  G = H // K
  q_BKGTDh = _heads_first(q_BTHDh * Dh**-0.5, K)
  k_BKTDh, v_BKTDh = (a.transpose(0, 2, 1, 3) for a in (k_BTKDh, v_BTKDh))
  outputs, logsumexps = [], []
  for start, end in _chunks(T):
    q_BKRDh = q_BKGTDh[:, :, :, start:end].reshape(B, K, -1, Dh)
    scores = _scores(q_BKRDh, k_BKTDh[:, :, :end], segment_ids_BT, start, end)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v_BKTDh.dtype).reshape(B, K, -1, end)
    out = product(weights, v_BKTDh[:, :, :end], 3, 2).reshape(B, K, G, -1, Dh) / total
    outputs.append(out.astype(q_BTHDh.dtype))
    logsumexps.append((top + jnp.log(total))[..., 0])
  out_BKGTDh, logsumexp_BKGT = kept((jnp.concatenate(outputs, axis=3), jnp.concatenate(logsumexps, axis=3)))
  residuals = q_BKGTDh, k_BKTDh, v_BKTDh, segment_ids_BT, out_BKGTDh, logsumexp_BKGT
  return out_BKGTDh.transpose(0, 3, 1, 2, 4).reshape(B, T, H, Dh), residuals


def _chunked_backward(residuals, dout_BTHDh):
  q_BKGTDh, k_BKTDh, v_BKTDh, segment_ids_BT, out_BKGTDh, logsumexp_BKGT = residuals
  B, K, G, T, Dh = q_BKGTDh.shape
  dtype = q_BKGTDh.dtype
  dout_BKGTDh = _heads_first(dout_BTHDh, K)
  delta_BKGT = jnp.sum((out_BKGTDh * dout_BKGTDh).astype(jnp.float32), axis=-1)
  dq, dk_BKTDh, dv_BKTDh = [], jnp.zeros((B, K, T, Dh)), jnp.zeros((B, K, T, Dh))
  for start, end in _chunks(T):
    rows = lambda a: a[:, :, :, start:end].reshape(B, K, -1, Dh)
    q_BKRDh, dout_BKRDh, k_BKSDh = rows(q_BKGTDh), rows(dout_BKGTDh), k_BKTDh[:, :, :end]
    scores = _scores(q_BKRDh, k_BKSDh, segment_ids_BT, start, end)
    weights = jnp.exp(scores - logsumexp_BKGT[:, :, :, start:end, None])
    dweights = product(dout_BKRDh, v_BKTDh[:, :, :end], 3, 3).reshape(weights.shape)
    dscores = (weights * (dweights - delta_BKGT[:, :, :, start:end, None])).astype(dtype).reshape(B, K, -1, end)
    weights = weights.astype(dtype).reshape(B, K, -1, end)
    dq.append(product(dscores, k_BKSDh, 3, 2).reshape(B, K, G, -1, Dh))
    dk_BKTDh = dk_BKTDh.at[:, :, :end].add(_keys_from_rows(q_BKRDh, dscores))
    dv_BKTDh = dv_BKTDh.at[:, :, :end].add(_keys_from_rows(dout_BKRDh, weights))
  dq_BKGTDh = jnp.concatenate(dq, axis=3) * Dh**-0.5
  dq_BTHDh = dq_BKGTDh.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, Dh)
  return dq_BTHDh.astype(dtype), *(a.transpose(0, 2, 1, 3).astype(dtype) for a in (dk_BKTDh, dv_BKTDh)), None


attention_chunked.defvjp(_chunked_forward, _chunked_backward)


def attention_cudnn(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT):
  """cuDNN flash attention; needs bfloat16 or float16 on the GPU."""
  same_B1TS = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
  return jax.nn.dot_product_attention(
      q_BTHDh, k_BTKDh, v_BTKDh, mask=same_B1TS, is_causal=True, implementation='cudnn'
  )


def attention_splash(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, mesh=None, part=None, interpret=False):
  """Splash attention; rows over the batch axes and heads over 'tensor'. Dh and T must be multiples of 128.

  With a `part`, within a shard_map: T queries against S keys. The two runs of a part's slots are cut into blocks, so
  they must be multiples of 128. `interpret` runs the kernel on CPU, for tests.
  """
  T = q_BTHDh.shape[1]
  slots_nT = np.arange(T, dtype=np.int32)[None] if part is None else part.slots_nT
  run = T if len(slots_nT) == 1 else T // 2
  block = next(size for size in splash.BLOCKS if run % size == 0)

  def shard(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT):
    kernel = splash.make_kernel(q_BTHDh.shape[2], slots_nT, slots_nT.size, block, interpret=interpret)
    if part is None:
      return splash.attend(kernel, q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, segment_ids_BT)
    n = len(slots_nT)  # tables are for all parts: q_sequence [n*T], else [heads, blocks of n*T, blocks of S]
    pieces = lambda a: a.reshape(n, -1) if a.ndim == 1 else a.reshape(len(a), n, -1, a.shape[2]).swapaxes(0, 1)
    kernel = jax.tree.map(lambda a: pieces(a)[part.index], kernel)
    return splash.attend(kernel, q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, part.key_segments_BS)

  return on_shards(shard, mesh if part is None else None, q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT)


# ----------------------------------------------------------------------------------------------------------------------
# queries of a part of the rows, keys of whole rows


def attention_part(q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BT, part):
  """`attention_chunked` for the queries of a part: chunks of queries, and for each the keys in spans up to its last."""
  heads_first = (a.transpose(0, 2, 1, 3) for a in (k_BSKDh, v_BSKDh))
  return _attention_part(q_BTHDh, *heads_first, segment_ids_BT, part.slots_T, part.key_segments_BS)


@jax.custom_vjp
def _attention_part(q_BTHDh, k_BKSDh, v_BKSDh, segment_ids_BT, slots_T, key_segments_BS):
  return _part_forward(q_BTHDh, k_BKSDh, v_BKSDh, segment_ids_BT, slots_T, key_segments_BS)[0]


def _part_forward(q_BTHDh, k_BKSDh, v_BKSDh, segment_ids_BT, slots_T, key_segments_BS):
  T, c = q_BTHDh.shape[1], min(q_BTHDh.shape[1], CHUNK)
  slots_BT = jnp.broadcast_to(slots_T[None], segment_ids_BT.shape)

  def attend(chunk):
    q_BcHDh, *where = chunk
    return _over_spans(q_BcHDh, k_BKSDh, v_BKSDh, *where, key_segments_BS)

  chunks = split(q_BTHDh, c), split(slots_BT, c, -1), split(segment_ids_BT, c)
  out_NBcHDh, logsumexp = kept(jax.lax.map(attend, chunks))
  out_BTHDh = join(out_NBcHDh, T)
  return out_BTHDh, (chunks, k_BKSDh, v_BKSDh, key_segments_BS, out_NBcHDh, logsumexp)


def _part_backward(residuals, dout_BTHDh):
  """As of `attention_chunked`; adds to the gradients of all keys, span by span."""
  chunks, k_BKSDh, v_BKSDh, key_segments_BS, out_NBcHDh, logsumexp = residuals
  B, K, S, Dh = k_BKSDh.shape
  (T, H), c, span = dout_BTHDh.shape[1:3], chunks[0].shape[2], min(S, SPAN)
  dtype = dout_BTHDh.dtype

  def one_chunk(dkeys, chunk):
    (q_BcHDh, slots_Bc, segments_Bc), out_BcHDh, dout_BcHDh, logsumexp_BKR1 = chunk
    rows = lambda a: _heads_first(a, K).reshape(B, K, -1, Dh)
    q_BKRDh, dout_BKRDh = rows(q_BcHDh), rows(dout_BcHDh)
    delta_BKR1 = jnp.sum((rows(out_BcHDh) * dout_BKRDh).astype(jnp.float32), axis=-1, keepdims=True)

    def one_span(i, carry):
      dq, dk_BKSDh, dv_BKSDh = carry
      first, k_BKsDh, v_BKsDh, visible_BKRs = _span(i, k_BKSDh, v_BKSDh, H // K, slots_Bc, segments_Bc, key_segments_BS)
      scores = product(q_BKRDh, k_BKsDh, 3, 3) * Dh**-0.5
      weights = jnp.where(visible_BKRs, jnp.exp(scores - logsumexp_BKR1), 0)
      dscores = weights * (product(dout_BKRDh, v_BKsDh, 3, 3) - delta_BKR1) * Dh**-0.5
      dscores, weights = dscores.astype(dtype), weights.astype(dtype)
      add = lambda all_BKSDh, new: jax.lax.dynamic_update_slice_in_dim(
          all_BKSDh, jax.lax.dynamic_slice_in_dim(all_BKSDh, first, span, axis=2) + new, first, axis=2
      )
      dk_BKSDh = add(dk_BKSDh, product(dscores, q_BKRDh, 2, 2))
      return dq + product(dscores, k_BKsDh, 3, 2), dk_BKSDh, add(dv_BKSDh, product(weights, dout_BKRDh, 2, 2))

    dq, *dkeys = jax.lax.fori_loop(0, _spans(slots_Bc, span), one_span, (jnp.zeros(q_BKRDh.shape), *dkeys))
    return tuple(dkeys), _rows_first(dq, H).astype(dtype)

  start = (jnp.zeros(k_BKSDh.shape),) * 2
  (dk, dv), dq = jax.lax.scan(one_chunk, start, (chunks, out_NBcHDh, split(dout_BTHDh, c), logsumexp))
  return join(dq, T), dk.astype(k_BKSDh.dtype), dv.astype(v_BKSDh.dtype), None, None, None


_attention_part.defvjp(_part_forward, _part_backward)


# ----------------------------------------------------------------------------------------------------------------------
# against a cache


def attention_cached(q_BTHDh, k_BKSDh, v_BKSDh, positions_BT):
  """T new queries against a cache of S slots, of which a query at position p sees 0..p. Returns [B, T, H, Dh].

  Chunks of queries, and for each the cache in spans up to its last position: no array over S, and a cache that is not
  full costs what it holds.
  """
  T, c = q_BTHDh.shape[1], min(q_BTHDh.shape[1], CHUNK)
  attend = lambda chunk: _over_spans(chunk[0], k_BKSDh, v_BKSDh, chunk[1])[0]
  if T == c:
    return attend((q_BTHDh, positions_BT))
  return join(jax.lax.map(attend, (split(q_BTHDh, c), split(positions_BT, c))), T)


# ----------------------------------------------------------------------------------------------------------------------
# keys in spans


def _over_spans(q_BcHDh, k_BKSDh, v_BKSDh, slots_Bc, segments_Bc=None, key_segments_BS=None):
  """One chunk's attention to the keys up to its slots, with a running softmax (FlashAttention, arXiv:2205.14135).

  Returns [B, c, H, Dh] and the logsumexp [B, K, R, 1] of the scores.
  """
  B, c, H, Dh = q_BcHDh.shape
  K, S = k_BKSDh.shape[1:3]
  q_BKRDh = _heads_first(q_BcHDh, K).reshape(B, K, -1, Dh)

  def one_span(i, carry):
    top, total, out = carry
    _, k_BKsDh, v_BKsDh, visible_BKRs = _span(i, k_BKSDh, v_BKSDh, H // K, slots_Bc, segments_Bc, key_segments_BS)
    scores = jnp.where(visible_BKRs, product(q_BKRDh, k_BKsDh, 3, 3) * Dh**-0.5, -1e30)
    higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
    weights, keep = jnp.exp(scores - higher), jnp.exp(top - higher)
    total = total * keep + jnp.sum(weights, axis=-1, keepdims=True)
    return higher, total, out * keep + product(weights.astype(v_BKsDh.dtype), v_BKsDh, 3, 2)

  column = (*q_BKRDh.shape[:3], 1)
  start = jnp.full(column, -1e30), jnp.zeros(column), jnp.zeros(q_BKRDh.shape)
  top, total, out = jax.lax.fori_loop(0, _spans(slots_Bc, min(S, SPAN)), one_span, start)
  return _rows_first(out / total, H).astype(q_BcHDh.dtype), top + jnp.log(total)


def _spans(slots_Bc, span):
  """Spans up to the last query's slot. The first in any case: padding, at slots below 0, gets some mean, not 0/0."""
  return jnp.maximum(jnp.max(slots_Bc), 0) // span + 1


def _span(i, k_BKSDh, v_BKSDh, G, slots_Bc, segments_Bc, key_segments_BS):
  """Where span i begins, its keys and values, and which of them each query sees: bool [B, 1, R, s]."""
  S = k_BKSDh.shape[2]
  span = min(S, SPAN)
  first = jnp.minimum(i * span, S - span)  # the last span may reach back: what it repeats counts once
  take = lambda a, axis: jax.lax.dynamic_slice_in_dim(a, first, span, axis=axis)
  slots_s = first + jnp.arange(span, dtype=jnp.int32)
  visible_Bcs = (slots_s[None, None] <= slots_Bc[..., None]) & (slots_s >= i * span)[None, None]
  if key_segments_BS is not None:
    visible_Bcs &= take(key_segments_BS, 1)[:, None] == segments_Bc[..., None]
  visible_B1Rs = jnp.broadcast_to(visible_Bcs[:, None, None], (len(slots_Bc), 1, G, *visible_Bcs.shape[1:]))
  return first, take(k_BKSDh, 2), take(v_BKSDh, 2), visible_B1Rs.reshape(len(slots_Bc), 1, -1, span)


def _rows_first(x_BKRDh, H):
  """[B, K, G*c, Dh] -> [B, c, H, Dh]."""
  B, K, R, Dh = x_BKRDh.shape
  return x_BKRDh.reshape(B, K, H // K, -1, Dh).transpose(0, 3, 1, 2, 4).reshape(B, -1, H, Dh)
