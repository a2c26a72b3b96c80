"""The grouped product's kernels for Hopper in interpret mode against the oracle, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_grouped import LOADS, assert_equals_oracle, inputs, values_and_gradients

from mmx.kernels_pallas import grouped_gpu

experts_hopper = functools.partial(grouped_gpu.experts_hopper, interpret=True)


@pytest.mark.parametrize('loads, N, k, E', LOADS)
def test_kernels_equal_oracle_in_values_and_gradients(loads, N, k, E):
  assert_equals_oracle(experts_hopper, inputs(loads, N, k, E), 1e-5)


def test_kernels_equal_oracle_in_bfloat16_and_with_several_tiles_of_each_side():
  arguments = inputs('uneven', 120, 2, 3, D=384, F=256, dtype=jnp.bfloat16)
  assert_equals_oracle(experts_hopper, arguments, 0.02)
  y, dx, _, *dmatrices = values_and_gradients(experts_hopper, *arguments)
  assert {array.dtype for array in (y, dx, *dmatrices)} == {jnp.dtype(jnp.bfloat16)}


def test_a_nan_in_a_row_of_no_expert_here_reaches_no_output():
  x, ids, *others = inputs('elsewhere', 140, 2, 4)
  away = np.asarray(ids == 4).all(axis=1)
  assert away.any()
  for found in values_and_gradients(experts_hopper, jnp.where(away[:, None], jnp.nan, x), ids, *others):
    assert bool(jnp.isfinite(found).all())


def test_no_program_writes_a_row_behind_its_group():
  """Another program writes there at the same time. Interpret mode fills outputs with NaN and runs one by one."""
  x, w = jnp.ones((256, 128)), jnp.ones((3, 128, 128))
  for product in (grouped_gpu._rows, grouped_gpu._transposed):
    written = jnp.isfinite(product(x, w, jnp.array([0, 30, 20], jnp.int32), interpret=True))
    np.testing.assert_array_equal(written, jnp.broadcast_to(jnp.arange(256)[:, None] < 50, (256, 128)))


def test_gradient_of_the_weights_reads_the_rows_of_its_group_alone():
  rng = np.random.default_rng(0)
  x, dy = (rng.normal(size=(100, 128)).astype(np.float32) for _ in range(2))
  expected = np.stack([np.zeros((128, 128)), x[:30].T @ dy[:30], x[30:50].T @ dy[30:50]])
  x[50:] = dy[50:] = np.nan
  found = grouped_gpu._weights(jnp.asarray(x), jnp.asarray(dy), jnp.array([0, 30, 20], jnp.int32), interpret=True)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_no_rows_at_all_give_zeros():
  x, ids, *others = inputs('uneven', 40, 2, 4)
  for found in values_and_gradients(experts_hopper, x, jnp.full_like(ids, 4), *others):
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize(
    'D, F, dtype, reason',
    [
        (256, 128, jnp.bfloat16, ''),
        (256, 192, jnp.bfloat16, 'd_model 256 and d_ff 192; multiples of 128 are supported'),
        (256, 128, jnp.float32, 'dtypes float32 and float32; bfloat16 is supported'),
    ],
)
def test_what_is_unsupported_is_said_in_one_line(D, F, dtype, reason):
  array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  assert grouped_gpu.unsupported(array(8, D), array(4, D, F)) == reason
