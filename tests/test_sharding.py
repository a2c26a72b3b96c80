"""Parameters on their way into products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx import sharding


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_a_cast_gives_the_bits_and_the_gradient_of_a_plain_one(dtype):
  rng = np.random.default_rng(0)
  w = np.concatenate([rng.normal(size=5000) * 10.0 ** rng.integers(-45, 39, 5000), [0, -0.0, np.inf, -np.inf, np.nan]])
  w, dy = jnp.asarray(w, jnp.float32), jnp.asarray(rng.normal(size=w.size), dtype)
  value_and_gradient = lambda cast: jax.jit(lambda w: (lambda y, back: (y, back(dy)[0]))(*jax.vjp(cast, w)))(w)
  wanted, got = value_and_gradient(lambda w: w.astype(dtype)), value_and_gradient(lambda w: sharding.cast(w, dtype))
  assert got[0].dtype == dtype and got[1].dtype == jnp.float32
  for a, b in zip(wanted, got, strict=True):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
