"""Where parameters lie, and how they get into products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec as P

from mmx import sharding
from mmx.layers.moe_transport import DOWN_AXES, GATE_AXES

ROWS, WHOLE = P('expert', 'context', None), P(('expert', 'context'), None, None)


@pytest.mark.parametrize('platform, sizes, gate, down', [
    ('tpu', {'expert': 16, 'context': 4}, ROWS, ROWS),
    ('gpu', {'expert': 16, 'context': 4}, WHOLE, WHOLE),
    ('gpu', {'expert': 64, 'context': 8}, ROWS, ROWS),  # 512 chips share 256 experts
    ('gpu', {'expert': 8, 'fsdp': 4, 'tensor': 2}, P(('expert', 'fsdp'), None, 'tensor'),
     P(('expert', 'fsdp'), 'tensor', None)),
])  # fmt: skip
def test_chips_of_the_same_experts_keep_rows_of_each_or_on_gpus_some_whole(platform, sizes, gate, down, monkeypatch):
  monkeypatch.setattr(sharding, 'platform_of', lambda mesh: platform)
  mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in sharding.AXES), sharding.AXES)
  assert sharding.spec_of(GATE_AXES, (256, 3072, 1536), mesh) == gate
  assert sharding.spec_of(DOWN_AXES, (256, 1536, 3072), mesh) == down


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
