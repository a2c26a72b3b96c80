"""Lightning attention: linear attention with one decay per head, computed in chunks (MiniMax-01, section 2.2.2).

The recurrence is that of `reference.lightning`: S_t = exp(-s) S_{t-1} + k_t^T v_t, o_t = q_t S_t. Unrolled over a chunk
with n_i the tokens of the chunk up to and with i,

  o_i = exp(-s n_i) q_i S  +  sum over j <= i of exp(-s (i - j)) <q_i, k_j> v_j
  S'  = exp(-s n_c) S      +  sum over j of exp(-s (n_c - n_j)) k_j^T v_j

Every exponent is at most 0, so nothing overflows however long the chunk; the factored form (q_i exp(-s i))
(k_j exp(s j)) would. Work is T (c + Dh) Dh per head, and memory besides q, k, v and o is one chunk's [c, c].

A document's end resets the state exactly: what is carried into a chunk reaches only tokens of its document. Padding
(segment 0) leaves the state alone: it has no place in n.

Letters: B batch, T tokens, H heads, Dh head dim, N chunks, c tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp

from mmx.kernels_pallas.chunks import join, kept, product, split


def lightning_chunked(q_BTHDh, k_BTHDh, v_BTHDh, slopes_H, segment_ids_BT, state_BHDhDh=None, chunk=64):
  """`reference.lightning` by chunks, one after the other; T = 1 is one step of the recurrence.

  The state stays float32, and so do the products with it. Differentiated as it stands: jax.checkpoint makes a chunk's
  weights again in the backward pass, so that between the passes only q, k, v and one state per chunk are kept. On CPU
  a backward pass by hand measures the same (B4 T1024 H4 Dh32: 22 ms against 19; H8 Dh128 T4096: 255 against 199).
  """
  B, T, H, Dh = q_BTHDh.shape
  chunk = min(chunk, T)
  slopes_H = jax.lax.stop_gradient(slopes_H.astype(jnp.float32))
  segment_ids_NBc = split(segment_ids_BT, chunk)
  xs = (*(split(a, chunk).swapaxes(2, 3) for a in (q_BTHDh, k_BTHDh, v_BTHDh)), segment_ids_NBc)
  if state_BHDhDh is None:
    state_BHDhDh = jnp.zeros((B, H, Dh, Dh), jnp.float32)
  # The document that the state belongs to: at the start, the row's first.
  first_B = jnp.min(jnp.where(segment_ids_BT > 0, segment_ids_BT, jnp.iinfo(jnp.int32).max), axis=1)
  step = functools.partial(_one_chunk, slopes_H, _decay_within(slopes_H, chunk))
  start = state_BHDhDh.astype(jnp.float32), first_B
  (state_BHDhDh, _), o_NBHcDh = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), start, xs)
  return kept((join(o_NBHcDh.swapaxes(2, 3), T), state_BHDhDh))


def _decay_within(slopes_H, chunk):
  """exp(-s (i - j)) for j <= i, else 0: float32 [1, H, c, c]."""
  distance_cc = jnp.arange(chunk)[:, None] - jnp.arange(chunk)[None, :]
  decay_Hcc = jnp.exp(-slopes_H[:, None, None] * jnp.maximum(distance_cc, 0)[None])
  return jnp.where(distance_cc[None] >= 0, decay_Hcc, 0)[None]


def _one_chunk(slopes_H, within_1Hcc, carry, xs):
  """(state, its document), chunk -> (the same behind the chunk), o [B, H, c, Dh]."""
  state_BHDhDh, document_B = carry
  q_BHcDh, k_BHcDh, v_BHcDh, segment_ids_Bc = xs
  real_Bc = segment_ids_Bc > 0
  count_Bc = jnp.cumsum(real_Bc, axis=1, dtype=jnp.int32)
  last_B = jnp.maximum(document_B, jnp.max(segment_ids_Bc, axis=1))  # ids of a row ascend
  fade = lambda steps_Bn: jnp.exp(-slopes_H[None, :, None] * steps_Bn[:, None, :].astype(jnp.float32))
  goes_on_Bc = segment_ids_Bc == document_B[:, None]
  into_BHc = jnp.where(goes_on_Bc[:, None], fade(count_Bc), 0)
  out_of_BHc = jnp.where((segment_ids_Bc == last_B[:, None])[:, None], fade(count_Bc[:, -1:] - count_Bc), 0)
  kept_BH1 = jnp.where((document_B == last_B)[:, None, None], fade(count_Bc[:, -1:]), 0)
  same_Bcc = (segment_ids_Bc[:, :, None] == segment_ids_Bc[:, None, :]) & real_Bc[:, :, None]

  # Inputs in bfloat16 meet float32 decays: their products with the state are float32 products.
  weights_BHcc = product(q_BHcDh, k_BHcDh, 3, 3) * jnp.where(same_Bcc[:, None], within_1Hcc, 0)
  o_BHcDh = product(weights_BHcc.astype(v_BHcDh.dtype), v_BHcDh, 3, 2)
  o_BHcDh += product(q_BHcDh.astype(jnp.float32), state_BHDhDh, 3, 2) * into_BHc[..., None]
  added_BHDhDh = product(k_BHcDh * out_of_BHc[..., None], v_BHcDh.astype(jnp.float32), 2, 2)
  return (state_BHDhDh * kept_BH1[..., None] + added_BHDhDh, last_B), o_BHcDh.astype(q_BHcDh.dtype)
