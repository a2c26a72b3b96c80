"""What the forms in chunks share: cutting a sequence up, putting it together, products of many small matrices; and how
they name what the backward pass would rather keep than make again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name


class Part(NamedTuple):
  """Queries that are one of n parts of their rows, where the keys are those of whole rows: a chip's share of them."""

  slots_nT: np.ndarray  # int32, where in the row the queries of each part stand; known when the program is built
  index: jax.Array  # int32 scalar: which part this is
  key_segments_BS: jax.Array  # int32

  @property
  def slots_T(self):
    return jnp.asarray(self.slots_nT)[self.index]


def places(segment_ids_BT, part=None):
  """(slots [B, T] of the queries in their rows, (their segments [B, T], those of the keys [B, S])); all queries, or a
  part of them."""
  slots_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32) if part is None else part.slots_T
  segments = segment_ids_BT, segment_ids_BT if part is None else part.key_segments_BS
  return jnp.broadcast_to(slots_T[None], segment_ids_BT.shape), segments


def sight(key_segments_BS, slots_BT, window=None):
  """First and last slot that each query sees, int32 [B, T] twice: its document's up to its own, `window` at most."""
  slots_BS = jnp.broadcast_to(jnp.arange(key_segments_BS.shape[1], dtype=jnp.int32), key_segments_BS.shape)
  begins_BS = key_segments_BS[:, 1:] != key_segments_BS[:, :-1]
  begin_BS = lax.cummax(jnp.where(jnp.pad(begins_BS, ((0, 0), (1, 0)), constant_values=True), slots_BS, 0), axis=1)
  first_BT = jnp.take_along_axis(begin_BS, slots_BT, axis=1)
  return first_BT if window is None else jnp.maximum(first_BT, slots_BT - (window - 1)), slots_BT


def kept(x):
  """What a mixer's kernels return, for its output and its gradient: `model.remat` 'mixer' keeps it, see layers/block.py."""
  return checkpoint_name(x, 'mixer')


def split(x, chunk, fill=0):
  """[B, T, ...] -> [N, B, c, ...], N = ceil(T / c), padded with `fill`; None stays None."""
  if x is None:
    return None
  B, T = x.shape[:2]
  x = jnp.pad(x, ((0, 0), (0, -T % chunk)) + ((0, 0),) * (x.ndim - 2), constant_values=fill) if T % chunk else x
  return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)


def join(x, T):
  """[N, B, c, ...] -> [B, T, ...], the padding cut off."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def product(a, b, axis_a, axis_b, batch_axes=2):
  """Matrix products over the leading `batch_axes`, contracting axis_a with axis_b, accumulated in float32."""
  batch = tuple(range(batch_axes))
  dims = (((axis_a,), (axis_b,)), (batch, batch))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def kernel_product(a, b, axis_a, axis_b):
  """Of two matrices within a TPU's kernel, in float32. Its matrix unit would round float32 operands if not told."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  dims = (((axis_a,), (axis_b,)), ((), ()))
  return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
