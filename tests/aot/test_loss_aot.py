"""Head and cross-entropy with both gradients on accelerators that are not here: M2's head, 8192 tokens."""

import jax
import jax.numpy as jnp

from mmx import loss

B, T, D, V, CHUNK = 2, 4096, 3072, 200064, 4096
HEAD = D * V * 2  # bytes in bfloat16
LOGITS = CHUNK * V * 4  # of one chunk; of all tokens twice that
MIB = 2**20


def compiled_with(compile_):
  array = jax.ShapeDtypeStruct
  hidden, head = array((B, T, D), jnp.bfloat16), array((D, V), jnp.float32)

  def mean(hidden, head, targets, mask):
    sums = loss.cross_entropy(hidden, head, targets, mask, CHUNK)
    return sums[0] / jnp.sum(mask), sums

  gradient = jax.value_and_grad(mean, (0, 1), has_aux=True)
  return compile_(gradient, hidden, head, array((B, T), jnp.int32), array((B, T), jnp.float32))


def test_tpu_holds_the_head_once_more_and_the_logits_of_one_chunk_and_takes_three_products(compile_for_tpu):
  compiled = compiled_with(compile_for_tpu)
  assert compiled.memory_analysis().temp_size_in_bytes < HEAD + LOGITS + 64 * MIB
  # What XLA counts is one turn of the loop: a chunk's logits and its part of two gradients.
  assert compiled.cost_analysis()['flops'] < 1.01 * 3 * 2 * CHUNK * D * V


def test_hopper_holds_the_head_once_more_and_the_logits_of_one_chunk_and_their_gradient(compile_for_hopper):
  compiled = compiled_with(compile_for_hopper)
  assert compiled.memory_analysis().temp_size_in_bytes < HEAD + LOGITS + LOGITS // 2 + 128 * MIB
