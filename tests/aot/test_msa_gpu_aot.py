"""MSA as training calls it, for Hopper cards that are not here: M3's heads, 64 and 4 of 128, 16 blocks of 128."""

import jax
import jax.numpy as jnp
from test_msa_aot import BLOCK, GIB, TOP_K, Dh, Di, H, K, array

from mmx.kernels_pallas.msa_gpu import msa_hopper, unsupported


def test_training_holds_nothing_over_the_square_of_the_length(compile_for_hopper, assembled):
  T = 16384

  def total(*arguments):
    out, kl = msa_hopper(*arguments, BLOCK, TOP_K)
    return jnp.sum(out.astype(jnp.float32)) + jnp.sum(kl)

  q, k, index_q, index_k = array(1, T, H, Dh), array(1, T, K, Dh), array(1, T, K, Di), array(1, T, Di)
  assert unsupported(q, k, index_q, index_k, BLOCK, TOP_K) == ''
  compiled = compile_for_hopper(jax.grad(total, range(5)), q, k, k, index_q, index_k, array(1, T, dtype=jnp.int32))
  kernels = assembled().values()
  # Selection, attention, its gradient, index scores, divergence.
  assert sum('wgmma.mma_async' in kernel.ptx for kernel in kernels) == 5
  assert all(kernel.spilled == 0 for kernel in kernels)
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * GIB  # scores of all pairs of tokens: 64 GiB in float32
