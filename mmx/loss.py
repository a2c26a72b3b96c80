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
  B, T, _ = hidden_BTD.shape
  head = head_DV.astype(hidden_BTD.dtype)
  columns = max(chunk // B, 1)
  if not chunk or columns >= T:
    return _chunk_sums(hidden_BTD, head, targets_BT, mask_BT)

  def split(array):
    """[B, T, ...] -> [chunks, B, columns, ...]: a chunk takes columns of all rows, so it stays spread over shards."""
    padded = jnp.pad(array, ((0, 0), (0, -T % columns)) + ((0, 0),) * (array.ndim - 2))
    return jnp.moveaxis(padded.reshape(B, -1, columns, *array.shape[2:]), 1, 0)

  def body(sums, piece):
    parts = jax.checkpoint(_chunk_sums)(piece[0], head, *piece[1:])
    return tuple(a + b for a, b in zip(sums, parts)), None

  return jax.lax.scan(body, (jnp.zeros(()),) * 3, tuple(map(split, (hidden_BTD, targets_BT, mask_BT))))[0]


def _chunk_sums(hidden_BCD, head_DV, targets_BC, mask_BC):
  logits_BCV = jnp.matmul(hidden_BCD, head_DV, preferred_element_type=jnp.float32)
  logsumexp_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
  target_logit_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
  correct_BC = target_logit_BC >= jax.lax.stop_gradient(jnp.max(logits_BCV, axis=-1))
  nll = jnp.sum((logsumexp_BC - target_logit_BC) * mask_BC)
  return nll, jnp.sum(logsumexp_BC**2 * mask_BC), jnp.sum(correct_BC * mask_BC)
