"""Full causal attention with packed segments, one form per platform, all equal to `reference.attention`.

  chunked  CPU (and anywhere): queries in chunks, each against its causal prefix only.
  cudnn    GPU: jax.nn.dot_product_attention's cuDNN kernel.
  splash   TPU: jax's Pallas splash attention, under shard_map when the mesh has several devices.

Letters: B batch, T tokens, H query heads, K kv heads, G = H/K, Dh head dim, c chunk of queries,
S keys a chunk sees or slots of a cache, R = G*c, s slots of a span.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmx.kernels_pallas.chunks import join, product, split

CHUNK = 64  # queries; smaller skips more of the future, larger makes better matrix products
SPAN = 256  # slots of a cache read at once


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
  out_BKGTDh, logsumexp_BKGT = jnp.concatenate(outputs, axis=3), jnp.concatenate(logsumexps, axis=3)
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


def attention_splash(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT, mesh=None):
  """Splash attention; rows over the batch axes and heads over 'tensor'. Dh and T must be multiples of 128."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  T, H, Dh = q_BTHDh.shape[1:]

  def shard(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT):
    heads = q_BTHDh.shape[2]
    kernel = splash.make_splash_mha_single_device(masks.MultiHeadMask([masks.CausalMask((T, T))] * heads))
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q_BTHDh * jnp.asarray(Dh**-0.5, q_BTHDh.dtype), k_BTKDh, v_BTKDh))
    segments = splash.SegmentIds(segment_ids_BT, segment_ids_BT)
    return jax.vmap(kernel)(q, k, v, segments).transpose(0, 2, 1, 3)

  if mesh is None or mesh.size == 1:
    return shard(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT)
  rows = ('replica', 'fsdp', 'expert')
  heads_spec = P(rows, None, 'tensor', None)
  specs = (heads_spec, heads_spec, heads_spec, P(rows, None))
  mapped = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=heads_spec, check_vma=False)
  return mapped(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT)


# ----------------------------------------------------------------------------------------------------------------------
# against a cache


def attention_cached(q_BTHDh, k_BKSDh, v_BKSDh, positions_BT):
  """T new queries against a cache of S slots, of which a query at position p sees 0..p. Returns [B, T, H, Dh].

  Chunks of queries, and for each the cache in spans up to its last position, with a running softmax (FlashAttention,
  arXiv:2205.14135): no array over S, and a cache that is not full costs what it holds.
  """
  B, T, H, Dh = q_BTHDh.shape
  K, S = k_BKSDh.shape[1:3]
  G, c, span = H // K, min(T, CHUNK), min(S, SPAN)

  def attend(chunk):
    q_BcHDh, positions_Bc = chunk
    q_BKRDh = _heads_first(q_BcHDh, K).reshape(B, K, G * c, Dh)

    def one_span(i, carry):
      top, total, out = carry
      first = jnp.minimum(i * span, S - span)  # the last span may reach back: what it repeats counts once
      slots_s = first + jnp.arange(span, dtype=jnp.int32)
      visible_Bcs = (slots_s[None, None] <= positions_Bc[..., None]) & (slots_s >= i * span)[None, None]
      k_BKsDh, v_BKsDh = (jax.lax.dynamic_slice_in_dim(a, first, span, axis=2) for a in (k_BKSDh, v_BKSDh))
      scores = product(q_BKRDh, k_BKsDh, 3, 3).reshape(B, K, G, c, span) * Dh**-0.5
      scores = jnp.where(visible_Bcs[:, None, None], scores, -1e30).reshape(B, K, G * c, span)
      higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
      weights, keep = jnp.exp(scores - higher), jnp.exp(top - higher)
      total = total * keep + jnp.sum(weights, axis=-1, keepdims=True)
      return higher, total, out * keep + product(weights.astype(v_BKsDh.dtype), v_BKsDh, 3, 2)

    column = (B, K, G * c, 1)
    start = jnp.full(column, -1e30), jnp.zeros(column), jnp.zeros((B, K, G * c, Dh))
    # The first span is read in any case: padding at negative positions gets some mean of it, not 0/0.
    _, total, out = jax.lax.fori_loop(0, jnp.maximum(jnp.max(positions_Bc), 0) // span + 1, one_span, start)
    out_BcKGDh = (out / total).reshape(B, K, G, c, Dh).transpose(0, 3, 1, 2, 4)
    return out_BcKGDh.reshape(B, c, H, Dh).astype(q_BTHDh.dtype)

  if T == c:
    return attend((q_BTHDh, positions_BT))
  return join(jax.lax.map(attend, (split(q_BTHDh, c), split(positions_BT, c))), T)
