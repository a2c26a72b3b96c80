"""Attention on TPUs that are not here."""

import re

import jax
import jax.numpy as jnp

from mmx.kernels_pallas import api
from mmx.layers.block import REMAT_POLICIES


def test_full_attention_is_the_library_kernel_with_no_scores_in_memory(compile_for_tpu):
  B, T, H, K, Dh = 1, 8192, 48, 8, 128
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  segments = jax.ShapeDtypeStruct((B, T), jnp.int32)

  def total(q, k, v, segments):
    return jnp.sum(api.attend(q, k, v, segments, implementation='auto', platform='tpu').astype(jnp.float32))

  gradient = jax.grad(total, (0, 1, 2))
  compiled = compile_for_tpu(gradient, array(B, T, H, Dh), array(B, T, K, Dh), array(B, T, K, Dh), segments)
  assert compiled.as_text().count('tpu_custom_call') >= 2
  assert compiled.memory_analysis().temp_size_in_bytes < T * T * H  # an eighth of the scores in float32 and less


def test_a_window_is_the_library_kernel_with_no_scores_in_memory(compile_for_tpu):
  B, T, H, K, Dh, window = 1, 8192, 48, 8, 128, 1024
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
  choice = {'window': window, 'sink_tokens': 0, 'implementation': 'auto', 'platform': 'tpu'}
  gradient = jax.grad(lambda *a: jnp.sum(api.sliding(*a, **choice).astype(jnp.float32)), (0, 1, 2))
  compiled = compile_for_tpu(gradient, array(B, T, H, Dh), array(B, T, K, Dh), array(B, T, K, Dh), ids, ids)
  assert compiled.as_text().count('tpu_custom_call') >= 3  # forwards, and backwards for queries and for keys
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * T * window * H  # half of a window's scores in float32


def test_remat_keeps_what_cudnn_returns_and_it_runs_once_forward(compile_for_hopper):
  T, H, K, Dh = 4096, 48, 8, 128
  array = lambda *shape: jax.ShapeDtypeStruct((1, T, *shape), jnp.bfloat16)
  segments = jax.ShapeDtypeStruct((1, T), jnp.int32)

  def calls(remat):
    def total(q, k, v, segments):
      attend = lambda q: jnp.tanh(api.attend(q * 2, k, v, segments, implementation='auto', platform='gpu'))
      block = jax.checkpoint(attend, policy=REMAT_POLICIES[remat], prevent_cse=False)
      # Two layers in a loop: of one, the compiler would see that both are the same.
      return jnp.sum(jax.lax.scan(lambda q, _: (block(q), None), q, length=2)[0].astype(jnp.float32))

    compiled = compile_for_hopper(jax.grad(total, (0, 1, 2)), array(H, Dh), array(K, Dh), array(K, Dh), segments)
    return len(re.findall(r'custom_call_target="__cudnn\$fmha', compiled.as_text()))

  assert (calls('mixer'), calls('full')) == (2, 3)  # of which one is the backward pass
