"""Lightning attention on Hopper cards that are not here."""

import jax
import jax.numpy as jnp
import pytest

from mmx.kernels_pallas import lightning_gpu

B, T, H, Dh = 1, 32768, 64, 128  # a layer of Text-01


@pytest.mark.parametrize('chunk', [64, 128])
@pytest.mark.parametrize('passes', [1, 4])
def test_lightning_keeps_no_states_and_no_scores(compile_for_hopper, assembled, chunk, passes):
  tokens = jax.ShapeDtypeStruct((B, T, H, Dh), jnp.bfloat16)
  slopes, segments = jax.ShapeDtypeStruct((H,), jnp.float32), jax.ShapeDtypeStruct((B, T), jnp.int32)

  def run(q, k, v, slopes, segments):
    return lightning_gpu.lightning_hopper(q, k, v, slopes, segments, chunk=chunk)

  def gradients(*arguments):
    outputs, transpose = jax.vjp(lambda *a: run(*a, *arguments[3:]), *arguments[:3])
    return transpose(outputs)

  assert lightning_gpu.unsupported(tokens, chunk) == ''
  function = run if passes == 1 else gradients
  compiled = compile_for_hopper(function, tokens, tokens, tokens, slopes, segments)
  assert compiled.as_text().count('custom_call_target="mosaic_gpu_v2"') == passes
  kernels = assembled()
  assert kernels
  for name, kernel in kernels.items():
    print(f'{name}: {kernel.registers} registers, {kernel.spilled} bytes spilled')
    assert 'wgmma.mma_async' in kernel.ptx and 'cp.async.bulk.tensor' in kernel.ptx
    assert kernel.spilled == 0
  # 512 MiB each: q, k, v without what stands on padding, and for the gradients one more, of o or its cotangent. A state
  # of each chunk, float32, would be 2048 MiB at 64 tokens a chunk, 1024 MiB at 128.
  arrays = 3 if passes == 1 else 4
  assert compiled.memory_analysis().temp_size_in_bytes < arrays * tokens.size * 2 * 1.02
