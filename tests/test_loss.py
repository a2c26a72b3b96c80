"""Head and cross-entropy against a plain form that autodiff goes through, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmx import config, hlo, loss, sharding

V = 50


def inputs(B=2, T=13, D=16, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
  head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
  mask = (rng.random((B, T)) < 0.7).astype(np.float32)
  mask[0, 3:7] = 0
  return hidden, head, targets, jnp.asarray(mask)


def plain(hidden, head, targets, mask, z_loss_weight=0.0):
  logits = jnp.einsum('btd,dv->btv', hidden.astype(jnp.float32), head)
  log_p = jax.nn.log_softmax(logits)
  logsumexp = logits[..., 0] - log_p[..., 0]
  nll = -jnp.sum(jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0] * mask)
  correct = jnp.sum((jnp.argmax(logits, -1) == targets) * mask)
  return nll + z_loss_weight * jnp.sum(logsumexp**2 * mask), nll, correct


def values_and_gradients(function, hidden, head, targets, mask, **options):
  """((loss, nll, correct), (dhidden, dhead)) of a third of the loss."""
  def scalar(hidden, head):
    sums = function(hidden, head, targets, mask, **options)
    return sums[0] / 3, sums

  (_, sums), gradients = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(hidden, head)
  return sums, gradients


def assert_close(found, expected, tolerance):
  for array, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    limit = tolerance * float(jnp.abs(wanted).max())
    np.testing.assert_allclose(array.astype(jnp.float32), wanted, rtol=0, atol=limit)


@pytest.mark.parametrize('chunk', [0, 1, 6, 1000])  # all, a column, 13 columns by threes, more than there are
@pytest.mark.parametrize('z_loss_weight', [0.0, 0.1])
def test_values_and_gradients_are_those_of_the_plain_form(chunk, z_loss_weight):
  arguments = inputs()
  expected = values_and_gradients(plain, *arguments, z_loss_weight=z_loss_weight)
  chunked = functools.partial(loss.cross_entropy, chunk=chunk, z_loss_weight=z_loss_weight)
  assert_close(values_and_gradients(chunked, *arguments), expected, 1e-5)
  assert_close(chunked(*arguments), expected[0], 1e-5)  # without gradient


def test_in_bfloat16_many_chunks_round_the_gradients_no_more_than_one():
  arguments = inputs(T=256, dtype=jnp.bfloat16)
  expected = values_and_gradients(plain, *arguments)
  for chunk in (0, 2):  # 1 and 256 chunks
    found = values_and_gradients(functools.partial(loss.cross_entropy, chunk=chunk), *arguments)
    assert_close(found, expected, 0.02)
    dhidden, dhead = found[1]
    assert dhidden.dtype == jnp.bfloat16 and dhead.dtype == jnp.float32
    # 0.0030 and 0.0027; the chunks' parts added up in bfloat16 would be off by 0.011.
    assert float(jnp.linalg.norm(dhead - expected[1][1]) / jnp.linalg.norm(expected[1][1])) < 0.004


# The gradient of a large head is scattered over its rows where they divide.
@pytest.mark.parametrize('D, large', [(16, 1), (12, 1), (16, sharding.LARGE)])
@pytest.mark.parametrize('shape', [{'fsdp': 8}, {'replica': 2, 'expert': 2, 'tensor': 2}])
def test_shards_of_the_batch_give_the_same(shape, D, large, monkeypatch):
  monkeypatch.setattr(sharding, 'LARGE', large)
  arguments = inputs(B=8, D=D)
  mesh = sharding.build_mesh(config.MeshConfig(**{'fsdp': 1} | shape))
  rows, head = NamedSharding(mesh, sharding.batch_spec()), NamedSharding(mesh, PartitionSpec(None, 'tensor'))
  placed = jax.device_put(arguments, (rows, head, rows, rows))
  chunked = functools.partial(loss.cross_entropy, chunk=16, mesh=mesh)
  assert_close(values_and_gradients(chunked, *placed), values_and_gradients(plain, *arguments), 1e-5)
  assert_close(jax.jit(chunked)(*placed), plain(*arguments), 1e-5)  # without gradient


def test_the_head_is_gathered_once_and_its_gradient_added_up_once_however_many_chunks(monkeypatch):
  monkeypatch.setattr(sharding, 'LARGE', 1)
  mesh = sharding.build_mesh(config.MeshConfig(fsdp=8))
  rows, head = NamedSharding(mesh, sharding.batch_spec()), NamedSharding(mesh, PartitionSpec('fsdp'))
  placed = jax.device_put(inputs(B=8, T=32), (rows, head, rows, rows))
  function = lambda hidden, head: loss.cross_entropy(hidden, head, *placed[2:], chunk=32, mesh=mesh)[0]
  compiled = jax.jit(jax.grad(function, (0, 1)), out_shardings=(rows, head)).lower(*placed[:2]).compile()
  computations, entry = hlo.parse(compiled.as_text())
  found = hlo.collectives(computations, hlo.runs(computations, entry))
  large = {c.kind: c.count for c in found if c.bytes > 16 * V}
  assert large == {'all-gather': 1, 'reduce-scatter': 1}
