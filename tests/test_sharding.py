"""Where parameters lie, and how they get into products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec as P

from mmx import config, hlo, sharding
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


@pytest.mark.parametrize('names, shape', [
    (('embed', 'heads', 'head_dim'), (16, 4, 6)), (('heads', 'head_dim', 'embed'), (4, 6, 16)),
    (('hidden', 'embed'), (24, 8)),
])  # fmt: skip
def test_a_product_gathers_a_large_matrix_axis_by_axis_and_scatters_its_gradient_so(names, shape, monkeypatch):
  monkeypatch.setattr(sharding, 'LARGE', 1)
  mesh = sharding.build_mesh(config.MeshConfig(fsdp=2, expert=2, context=2))
  X = 1 if names[0] == 'embed' else len(shape) - 1
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x, w, dy = normal(4, 6, *shape[:X]), normal(*shape), normal(4, 6, *shape[X:])

  def run(mesh):
    return lambda x, w: (lambda y, back: (y, *back(dy)))(*jax.vjp(lambda x, w: sharding.product(x, w, names, mesh), x, w))

  placed = [NamedSharding(mesh, spec) for spec in (sharding.batch_spec(), sharding.spec_of(names, shape, mesh))]
  assert ('fsdp', 'expert', 'context') in placed[1].spec
  compiled = jax.jit(run(mesh), out_shardings=(placed[0], *placed)).lower(*jax.device_put((x, w), tuple(placed))).compile()
  found = {(c.kind, c.group): c.count for c in hlo.collectives(*_program(compiled))}
  assert found == {('all-gather', 2): 3, ('reduce-scatter', 2): 3}  # no other way to send anything
  wanted = run(None)(x, w)
  np.testing.assert_allclose(wanted[0], np.tensordot(x, w, X), rtol=1e-5, atol=1e-5)
  for a, b in zip(compiled(*jax.device_put((x, w), tuple(placed))), wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def _program(compiled):
  computations, entry = hlo.parse(compiled.as_text())
  return computations, hlo.runs(computations, entry)
