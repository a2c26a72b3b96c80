"""jax's Pallas splash attention for TPU behind our signatures: causal, within segments, to all keys or to a window.

Queries may be others than the keys' own: parts of rows (`attention.attention_splash`), or all but a row's first
(`sliding.sliding_splash`).

Letters: B batch, T tokens, H query heads, K kv heads, Dh head dim, S keys, n parts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

BLOCKS = (512, 256, 128)  # queries and keys; at 196,608 tokens, tables of blocks of 128 exceed scalar memory


def make_kernel(heads, slots_nT, keys, block, window=None, interpret=False):
  """The kernel for n parts of T queries each, at these slots of so many keys; with its gradients.

  Args:
    slots_nT: int32 numpy.
    block: queries and keys computed at once; divides T, or each run of slots one after the other in it, and `keys`.
    window: None for all keys up to a query, or how many of them, its own included.
    interpret: runs the kernel on CPU, for tests.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  names = ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute', 'q_dq', 'kv_dq')
  sizes = splash.BlockSizes(**{f'block_{name}': block for name in names})
  mask = masks.MultiHeadMask([mask_of(window)(slots_nT.reshape(-1), keys)] * heads)
  options = {'head_shards': 1, 'q_seq_shards': len(slots_nT), 'interpret': interpret}
  return splash.make_splash_mha(mask, block_sizes=sizes, residual_checkpoint_name='mixer', **options)


def attend(kernel, q_BTHDh, k_BSKDh, v_BSKDh, segment_ids_BT, key_segments_BS):
  """[B, T, H, Dh]."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

  scale = jnp.asarray(q_BTHDh.shape[-1] ** -0.5, q_BTHDh.dtype)
  q, k, v = (a.transpose(0, 2, 1, 3) for a in (q_BTHDh * scale, k_BSKDh, v_BSKDh))
  return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment_ids_BT, key_segments_BS)).transpose(0, 2, 1, 3)


@functools.cache
def mask_of(window):
  """The class of splash's causal mask for queries in any order, to a window of keys or, if None, to all; one class of
  each, as masks that are equal are cut up once."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  class Mask(masks.CausalMask):
    """slots: int32 numpy, where each query stands among so many keys.

    Splash asks of each block whether any or all is seen, and what is in the blocks on the edges. Where all is alike one
    element tells it: at 196,608 tokens whole blocks would be 39 billion elements, made six times.
    """

    def __init__(self, slots, keys):
      super().__init__((slots.size, keys))
      self.q_sequence = slots
      if window is not None:
        self.mask_function = lambda query, key: (query >= key) & (query - key < window)

    def __getitem__(self, block):
      rows, keys = self.q_sequence[block[0]], block[1]
      first, last, reach = rows.min(), rows.max(), window or self.shape[1]
      if last < keys.start or first - reach >= keys.stop - 1:
        return np.zeros((1, 1), bool)
      if first >= keys.stop - 1 and last - reach < keys.start:
        return np.ones((1, 1), bool)
      return super().__getitem__(block)

  return Mask
