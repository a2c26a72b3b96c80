"""Head and cross-entropy in chunks of tokens, with the gradient made on the way forward.

But for one factor, the gradient of a summed cross-entropy is known as soon as the logits are: p - onehot. So each
chunk's logits are made once and turned into its share of both gradients right away, three products of [tokens, D, V],
where a checkpointed chunk makes them again in the backward pass, four. Logits of all tokens are never held: at M2's
head and chunk (3072 x 200,064, 4096 tokens) there are, beside the gradients, the head in bfloat16 (1172 MiB), a chunk's
logits in float32 (3126 MiB) and, on Hopper, their gradient in bfloat16 (1563 MiB), which TPUs make within the products.

On a mesh every shard of the batch works on its own tokens: the head is gathered once, in the dtype of the products, and
the shards' gradients of it are added up once, behind the last chunk. Left to the partitioner, both happen in each chunk.

Letters: B rows, T tokens, C tokens of a row in one chunk, D model, V vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmx import sharding

COLUMNS = 256  # a multiple of which the head has on a mesh: libtpu scatters no sum of 200,064 columns, it copies it


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(hidden_BTD, head_DV, targets_BT, mask_BT, chunk=0, z_loss_weight=0.0, mesh=None):
  """Summed cross-entropy of next-token prediction over masked positions, in nats, float32.

  Args:
    hidden_BTD: in the dtype of the products. Chunks' parts of the head's gradient are added up in float32.
    head_DV: cast to hidden's dtype once.
    chunk: tokens, of all shards together, whose logits are held at a time (V = 200,064: 0.8 MB a token in float32); 0
      is all at once.
    z_loss_weight: weight of the sum of logsumexp^2 in `loss`.
    mesh: `jax.sharding.Mesh` that the batch is laid on; None is one device.

  Returns:
    (loss, nll, correct): sums over mask_BT of the loss with its z-loss, of -log p, and of correct argmaxes. Only `loss`
    has a gradient.
  """
  V = head_DV.shape[1]

  def sums(hidden_BTD, head_DV, targets_BT, mask_BT, chunk):
    def body(sums, piece):
      return tuple(map(jnp.add, sums, _chunk(head_DV, V, *piece, z_loss_weight)[0])), None

    return jax.lax.scan(body, (jnp.zeros(()),) * 3, _split(chunk, hidden_BTD, targets_BT, mask_BT))[0], (), ()

  return _on_shards(sums, mesh, chunk, hidden_BTD, head_DV, targets_BT, mask_BT)[0]


def _forward(hidden_BTD, head_DV, targets_BT, mask_BT, chunk, z_loss_weight, mesh):
  V = head_DV.shape[1]

  def sums_and_gradients(hidden_BTD, head_DV, targets_BT, mask_BT, chunk):
    T = hidden_BTD.shape[1]

    def body(carry, piece):
      sums, dhead_DV = carry
      parts, dlogits_BCV = _chunk(head_DV, V, *piece, z_loss_weight)
      dhead_DV += jnp.einsum('bcd,bcv->dv', piece[0], dlogits_BCV, preferred_element_type=jnp.float32)
      return (tuple(map(jnp.add, sums, parts)), dhead_DV), jnp.einsum('bcv,dv->bcd', dlogits_BCV, head_DV)

    start = (jnp.zeros(()),) * 3, jnp.zeros(head_DV.shape, jnp.float32)
    (sums, dhead_DV), pieces = jax.lax.scan(body, start, _split(chunk, hidden_BTD, targets_BT, mask_BT))
    return sums, jnp.moveaxis(pieces, 0, 1).reshape(hidden_BTD.shape[0], -1, hidden_BTD.shape[2])[:, :T], dhead_DV

  sums, dhidden_BTD, dhead_DV = _on_shards(
      sums_and_gradients, mesh, chunk, hidden_BTD, head_DV, targets_BT, mask_BT
  )
  return sums, (dhidden_BTD, dhead_DV.astype(head_DV.dtype))


def _backward(chunk, z_loss_weight, mesh, gradients, cotangents):
  scaled = lambda gradient: (gradient * cotangents[0]).astype(gradient.dtype)
  return *map(scaled, gradients), None, None


cross_entropy.defvjp(_forward, _backward)


def _on_shards(function, mesh, chunk, hidden_BTD, head_DV, targets_BT, mask_BT):
  """function(hidden, head, targets, mask, chunk) -> (sums, dhidden_BTD, dhead_DV) on each shard's tokens, the first and
  the last added up. The head comes to it whole, with columns of padding; the axis of the vocabulary is the partitioner's.
  """
  head_DV, tokens, axes = head_DV.astype(hidden_BTD.dtype), sharding.batch_spec(), sharding.token_axes(mesh)
  if not axes:
    return function(hidden_BTD, head_DV, targets_BT, mask_BT, chunk)
  shards = math.prod(mesh.shape[axis] for axis in axes)
  parts, V = sharding.parts_of(('embed', 'vocab'), head_DV.shape, mesh), head_DV.shape[1]
  add_up, of_head = sharding.sum_of_shards(head_DV.shape, 0, mesh)

  def added_up(dhead_DV):
    # Without the barrier libtpu 0.0.42 makes one slice of this and its own, and fails over 512 chips ('RET_CHECK').
    return jax.lax.optimization_barrier(add_up(dhead_DV))[:, :V]

  def on_shard(hidden_BTD, head_DV, *arrays):
    head_DV = jnp.pad(head_DV, ((0, 0), (0, -V % COLUMNS)))
    sums, dhidden_BTD, dhead_DV = function(hidden_BTD, sharding.gathered(head_DV, parts), *arrays, -(-chunk // shards))
    return jax.lax.psum(sums, axes), dhidden_BTD, jax.tree.map(added_up, dhead_DV)

  specs = (tokens, parts, tokens, tokens), (P(), tokens, of_head)
  return sharding.on_tokens(on_shard, mesh, *specs)(hidden_BTD, head_DV, targets_BT, mask_BT)


def _split(chunk, *arrays):
  """[B, T, ...] -> [chunks, B, C, ...]: a chunk takes columns of all rows, so that it stays spread over shards."""
  B, T = arrays[0].shape[:2]
  C = min(max(chunk // B, 1), T) if chunk else T

  def split(array):
    padded = jnp.pad(array, ((0, 0), (0, -T % C)) + ((0, 0),) * (array.ndim - 2))
    return jnp.moveaxis(padded.reshape(B, -1, C, *array.shape[2:]), 1, 0)

  return tuple(map(split, arrays))


def _chunk(head_DV, vocabulary, hidden_BCD, targets_BC, mask_BC, z_loss_weight):
  """(loss, nll, correct) of a chunk, and the gradient of its loss by the logits, in hidden's dtype. Columns of the head
  beyond the vocabulary are padding."""
  logits_BCV = jnp.matmul(hidden_BCD, head_DV, preferred_element_type=jnp.float32)
  if head_DV.shape[1] > vocabulary:
    logits_BCV = jnp.where(jnp.arange(head_DV.shape[1])[None, None] < vocabulary, logits_BCV, -jnp.inf)
  logsumexp_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
  target_logit_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
  correct = jnp.sum((target_logit_BC >= jnp.max(logits_BCV, axis=-1)) * mask_BC)
  nll = jnp.sum((logsumexp_BC - target_logit_BC) * mask_BC)
  loss = nll + z_loss_weight * jnp.sum(logsumexp_BC**2 * mask_BC)

  p_BCV = jnp.exp(logits_BCV - logsumexp_BC[..., None])
  target_BCV = jnp.arange(head_DV.shape[1])[None, None] == targets_BC[..., None]
  dlogits_BCV = p_BCV * (1 + 2 * z_loss_weight * logsumexp_BC[..., None]) - target_BCV
  return (loss, nll, correct), (dlogits_BCV * mask_BC[..., None]).astype(hidden_BCD.dtype)
