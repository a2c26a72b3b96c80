"""Every grouped form equals the oracle, values and gradients, on uneven, empty and hot groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.kernels_pallas import api, grouped, reference

FORMS = {
    'loop': grouped.experts_loop,
    'blocks': grouped.experts_blocks,
    'megablox': functools.partial(grouped.experts_megablox, interpret=True),
}


def slow_experts(x, ids, weights, w_gate, w_up, w_down):
  """An independent loop over assignments in float64."""
  y = np.zeros(x.shape)
  for n in range(ids.shape[0]):
    for expert, weight in zip(ids[n], weights[n]):
      if expert == w_down.shape[0]:
        continue
      gate, up = (x[n].astype(np.float64) @ w[expert] for w in (w_gate, w_up))
      y[n] += weight * ((gate / (1 + np.exp(-gate)) * up) @ w_down[expert])
  return y


def inputs(loads, N, k, E, D=128, F=128, seed=0, dtype=jnp.float32):
  """Routes by `loads`: 'uneven', 'hot' (one expert gets every token), 'empty' (half are unused), 'elsewhere'."""
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=(N, E)) + np.linspace(0, 2, E)
  if loads == 'hot':
    scores[:, 1] = 100
  if loads == 'empty':
    scores[:, ::2] = -100
  ids = np.argsort(-scores, axis=1)[:, :k].astype(np.int32)
  if loads == 'elsewhere':  # assignments that live on another shard
    ids[rng.random(ids.shape) < 0.6] = E
  weights = rng.random((N, k)).astype(np.float32)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.1, dtype)
  matrices = normal(E, D, F), normal(E, D, F), normal(E, F, D)
  return normal(N, D) * 10, jnp.asarray(ids), jnp.asarray(weights), *matrices


@pytest.mark.parametrize('loads', ['uneven', 'elsewhere'])
def test_oracle_equals_slow_loop(loads):
  args = inputs(loads, 37, 3, 5, D=16, F=8)
  np.testing.assert_allclose(reference.experts(*args), slow_experts(*map(np.asarray, args)), rtol=1e-4, atol=1e-5)


LOADS = [('uneven', 333, 2, 5), ('hot', 150, 1, 4), ('empty', 130, 3, 8), ('elsewhere', 201, 4, 6)]


def values_and_gradients(function, x, ids, weights, *matrices):
  """(y, gradients by x, weights, w_gate, w_up and w_down) under a fixed random cotangent."""
  target = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

  def scalar(x, weights, *matrices):
    y = function(x, ids, weights, *matrices)
    return jnp.sum(y.astype(jnp.float32) * target), y

  gradient = jax.jit(jax.value_and_grad(scalar, argnums=range(5), has_aux=True))
  (_, y), gradients = gradient(x, weights, *matrices)
  return y, *gradients


def assert_equals_oracle(function, arguments, tolerance):
  """In values and gradients, relative to the largest of each; the oracle computes in float32 from the same numbers."""
  found = values_and_gradients(function, *arguments)
  x, ids, *others = arguments
  x, *others = (array.astype(jnp.float32) for array in (x, *others))
  expected = values_and_gradients(reference.experts, x, ids, *others)
  for name, array, wanted in zip(('y', 'x', 'weights', 'w_gate', 'w_up', 'w_down'), found, expected, strict=True):
    # Where an assignment is not here its weight has no effect; the oracle's one-hot says the same: exactly zero.
    limit = tolerance * float(jnp.abs(wanted).max())
    np.testing.assert_allclose(array.astype(jnp.float32), wanted, rtol=10 * tolerance, atol=limit, err_msg=name)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('loads, N, k, E', LOADS)
def test_form_equals_oracle_in_values_and_gradients(form, loads, N, k, E):
  assert_equals_oracle(FORMS[form], inputs(loads, N, k, E), 1e-5)


@pytest.mark.parametrize('form', FORMS)
def test_form_works_in_bfloat16(form):
  arguments = inputs('uneven', 200, 2, 4, dtype=jnp.bfloat16)
  assert_equals_oracle(FORMS[form], arguments, 0.02)
  y, dx, _, *dmatrices = values_and_gradients(FORMS[form], *arguments)
  assert {array.dtype for array in (y, dx, *dmatrices)} == {jnp.dtype(jnp.bfloat16)}


def test_a_nan_in_a_row_of_no_expert_here_reaches_no_output():
  x, ids, *others = inputs('elsewhere', 140, 2, 4)
  away = np.asarray(ids == 4).all(axis=1)
  assert away.any()
  poisoned = jnp.where(away[:, None], jnp.nan, x)
  for found in values_and_gradients(FORMS['megablox'], poisoned, ids, *others):
    assert bool(jnp.isfinite(found).all())


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('spare', [0, 7])
def test_rows_for_no_more_than_are_here_give_the_same(form, spare):
  arguments = inputs('elsewhere', 201, 4, 6)
  here = int(np.sum(np.asarray(arguments[1]) < 6))
  assert here + spare < arguments[1].size
  assert_equals_oracle(functools.partial(FORMS[form], most=here + spare), arguments, 1e-5)


def test_no_assignment_here_is_exactly_zero():
  x, ids, *others = inputs('uneven', 40, 2, 4)
  for form in FORMS.values():
    y = form(x, jnp.full_like(ids, 4), *others)
    np.testing.assert_array_equal(y, 0)


def test_work_of_the_blocks_follows_the_true_loads():
  sizes = jnp.array([0, 1, 300, 128, 0], jnp.int32)
  assert int(grouped.schedule(sizes, 4096, 128).count) == 0 + 1 + 3 + 1 + 0
  blocks = grouped.schedule(sizes, 4096, 128)
  np.testing.assert_array_equal(blocks.expert[:5], [1, 2, 2, 2, 3])
  np.testing.assert_array_equal(blocks.row[:5], [0, 1, 129, 257, 301])


def test_sort_is_stable_and_its_inverse_exact():
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 7, (50, 3)), jnp.int32)
  rows = grouped.sort_by_expert(ids, 6)
  np.testing.assert_array_equal(rows.source_R, np.argsort(np.asarray(ids).ravel(), kind='stable'))
  np.testing.assert_array_equal(rows.source_R[rows.slot_Nk], np.arange(150).reshape(50, 3))
  np.testing.assert_array_equal(rows.group_sizes_E, np.bincount(np.asarray(ids).ravel(), minlength=7)[:6])


def test_named_implementation_never_falls_back():
  args = inputs('uneven', 16, 2, 4)
  with pytest.raises(ValueError, match="'megablox' cannot be used here: not for cpu"):
    api.experts(*args, implementation='megablox', platform='cpu')


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_auto_choice_lowers_for_accelerators_on_a_cpu_host(platform):
  args = inputs('uneven', 256, 2, 4)
  function = functools.partial(api.experts, implementation='auto', platform={'cuda': 'gpu'}.get(platform, platform))
  gradient = jax.grad(lambda *args: jnp.sum(function(*args)), argnums=(0, 2, 3, 4, 5))
  text = jax.jit(gradient).trace(*args).lower(lowering_platforms=(platform,)).as_text()
  assert ('tpu_custom_call' in text) == (platform == 'tpu')
