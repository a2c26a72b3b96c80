"""Full causal attention with packed segments, one form per platform, all equal to `reference.attention`.

  chunked  CPU (and anywhere): queries in chunks, each against its causal prefix only, recomputed in the backward pass.
  cudnn    GPU: jax.nn.dot_product_attention's cuDNN kernel.
  splash   TPU: jax's Pallas splash attention, under shard_map when the mesh has several devices.

Letters: B batch, T tokens, H query heads, K kv heads, G = H/K, Dh head dim, c chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

CHUNK = 128  # queries; halves the score matrix against one block at T=256


def attention_chunked(q_BTHDh, k_BTKDh, v_BTKDh, segment_ids_BT):
  """Scores of one chunk of queries against its prefix at a time: T^2/2 work; memory for one chunk when T > 1024."""
  B, T, H, Dh = q_BTHDh.shape
  K = k_BTKDh.shape[2]
  G = H // K
  q_BKGTDh = (q_BTHDh * Dh**-0.5).reshape(B, T, K, G, Dh).transpose(0, 2, 3, 1, 4)
  k_BKDhT = k_BTKDh.transpose(0, 2, 3, 1)
  v_BKTDh = v_BTKDh.transpose(0, 2, 1, 3)
  chunk = functools.partial(_attend_chunk, G=G)
  if T > 1024:
    chunk = jax.checkpoint(chunk)
  outputs = []
  for start in range(0, T, CHUNK):
    end = min(start + CHUNK, T)
    q_BKRDh = q_BKGTDh[:, :, :, start:end].reshape(B, K, G * (end - start), Dh)
    segments = segment_ids_BT[:, start:end], segment_ids_BT[:, :end]
    outputs.append(chunk(q_BKRDh, k_BKDhT[..., :end], v_BKTDh[:, :, :end], *segments))
  return jnp.concatenate(outputs, axis=1).reshape(B, T, H, Dh)


def _attend_chunk(q_BKRDh, k_BKDhS, v_BKSDh, query_segment_Bc, key_segment_BS, *, G):
  """Rows R = G*c: the G heads of a group share keys, so they are stacked into one matrix product."""
  B, K, R, Dh = q_BKRDh.shape
  c, S = R // G, k_BKDhS.shape[-1]
  scores = jnp.matmul(q_BKRDh, k_BKDhS, preferred_element_type=jnp.float32).reshape(B, K, G, c, S)
  causal_cS = jnp.arange(S - c, S)[:, None] >= jnp.arange(S)[None, :]
  visible_BcS = causal_cS[None] & (query_segment_Bc[:, :, None] == key_segment_BS[:, None, :])
  scores = jnp.where(visible_BcS[:, None, None], scores, -1e30)  # a query always sees itself: no row is all masked
  probabilities = jax.nn.softmax(scores, axis=-1).astype(v_BKSDh.dtype).reshape(B, K, R, S)
  out = jnp.matmul(probabilities, v_BKSDh).reshape(B, K, G, c, Dh)
  return out.transpose(0, 3, 1, 2, 4).reshape(B, c, K * G, Dh)


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
