"""Head and cross-entropy in chunks of tokens, and the terms added to it."""

import jax
import jax.numpy as jnp


def cross_entropy(hidden_BTD, head_DV, targets_BT, mask_BT, chunk=0):
  """Summed cross-entropy of next-token prediction over masked positions, in nats, float32.

  Logits are made in chunks of `chunk` tokens and remade in the backward pass, so that [B, T, V] is never held
  (V = 200,064: 0.8 MB a token in float32); `chunk` 0 makes them all at once.

  Returns:
    (sum of -log p, sum of logsumexp^2 for the z-loss, sum of correct argmaxes), each over mask_BT.
  """
  D = hidden_BTD.shape[-1]
  hidden_ND, targets_N, mask_N = hidden_BTD.reshape(-1, D), targets_BT.reshape(-1), mask_BT.reshape(-1)
  head = head_DV.astype(hidden_BTD.dtype)
  N = targets_N.shape[0]
  if not chunk or N <= chunk:
    return _chunk_sums(hidden_ND, head, targets_N, mask_N)
  pad = -N % chunk
  hidden_ND = jnp.pad(hidden_ND, ((0, pad), (0, 0)))
  targets_N, mask_N = jnp.pad(targets_N, (0, pad)), jnp.pad(mask_N, (0, pad))

  def body(sums, piece):
    parts = jax.checkpoint(_chunk_sums)(piece[0], head, *piece[1:])
    return tuple(a + b for a, b in zip(sums, parts)), None

  pieces = hidden_ND.reshape(-1, chunk, D), targets_N.reshape(-1, chunk), mask_N.reshape(-1, chunk)
  return jax.lax.scan(body, (jnp.zeros(()),) * 3, pieces)[0]


def _chunk_sums(hidden_ND, head_DV, targets_N, mask_N):
  logits_NV = jnp.matmul(hidden_ND, head_DV, preferred_element_type=jnp.float32)
  logsumexp_N = jax.nn.logsumexp(logits_NV, axis=-1)
  target_logit_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
  correct_N = target_logit_N >= jax.lax.stop_gradient(jnp.max(logits_NV, axis=-1))
  nll = jnp.sum((logsumexp_N - target_logit_N) * mask_N)
  return nll, jnp.sum(logsumexp_N**2 * mask_N), jnp.sum(correct_N * mask_N)
