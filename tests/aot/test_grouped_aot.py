"""One layer's experts with all gradients on accelerators that are not here: M2's 3072 x 1536, bfloat16, top-8."""

import jax
import jax.numpy as jnp
import pytest

from mmx.kernels_pallas import grouped, grouped_gpu

D, F, k = 3072, 1536, 8
R = 32768
ROWS = R * D * 2  # bytes of x, h or y by row


def gradient(experts):
  def total(x, ids, weights, *matrices):
    y = experts(x, ids, weights, *(w.astype(jnp.bfloat16) for w in matrices))
    return jnp.sum(y.astype(jnp.float32) ** 2)

  return jax.grad(total, (0, 2, 3, 4, 5))


def inputs(E, dtype):
  """Of E experts on this chip, with parameters of a dtype."""
  array = jax.ShapeDtypeStruct
  tokens = array((R // k, D), jnp.bfloat16), array((R // k, k), jnp.int32), array((R // k, k), jnp.float32)
  return *tokens, *(array(shape, dtype) for shape in ((E, D, F), (E, D, F), (E, F, D)))


@pytest.mark.parametrize('E', [4, 32])
def test_megablox_takes_ideal_flops_and_holds_no_second_copy_of_the_weights(compile_for_tpu, E):
  compiled = compile_for_tpu(gradient(grouped.experts_megablox), *inputs(E, jnp.float32))
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 9
  ideal = 3 * 2 * R * 3 * D * F
  assert compiled.cost_analysis()['flops'] < 1.01 * ideal  # dw of all rows by every expert would be E/3 times that
  # x, gate, up, y and their gradients, some at a time; with 32 experts the weights in bfloat16 (4.5 ROWS) have their
  # turn before, or are kept (jax 0.12's libtpu: 10.3 ROWS). Transposed for dx they would be as much again.
  most = 7 if jax.__version_info__ < (0, 11) else 10.5
  assert compiled.memory_analysis().temp_size_in_bytes < most * ROWS


@pytest.fixture
def machine_codes(monkeypatch, tmp_path):
  """machine_codes() -> PTX of what this test has compiled."""
  compile_ = jax.stages.Lowered.compile
  dump = {'xla_dump_to': str(tmp_path), 'xla_dump_emitter_re': 'ptx'}
  dumping = lambda lowered, options: compile_(lowered, options | dump)
  monkeypatch.setattr(jax.stages.Lowered, 'compile', dumping)
  return lambda: [path.read_text() for path in sorted(tmp_path.glob('*.ptx'))]


def test_hopper_kernels_use_the_matrix_units_and_hold_rows_and_no_weights(compile_for_hopper, machine_codes):
  arguments = inputs(256, jnp.bfloat16)
  assert grouped_gpu.unsupported(arguments[0], arguments[3]) == ''
  compiled = compile_for_hopper(gradient(grouped_gpu.experts_hopper), *arguments)
  assert compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 9
  assert compiled.memory_analysis().temp_size_in_bytes < 4.2 * ROWS  # the weights of 256 experts: 36 times ROWS
  kernels = [code for code in machine_codes() if 'wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16' in code]
  assert len(kernels) >= 5  # gate or up and down, of y, dx and dw; two of equal shape may be one
  for code in kernels:
    assert '.target sm_90a' in code and 'cp.async.cg.shared.global' in code
    assert 'wgmma.wait_group.sync.aligned 1;' in code  # a product runs while the next step's operands arrive
