"""Sliding-window attention: every form equals the oracle; values and cost know nothing of what the window hides."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.kernels_pallas import api, reference, sliding, splash


def slow_sliding(q, k, v, segments, positions, window, sink_tokens):
  """One query at a time, float64."""
  B, T, H, Dh = q.shape
  out = np.zeros(q.shape)
  for b in range(B):
    for h in range(H):
      kv = h // (H // k.shape[2])
      for t in range(T):
        document = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        near = [s for s in document if t - s < window or positions[b, s] < sink_tokens]
        scores = np.array([q[b, t, h].astype(np.float64) @ k[b, s, kv] for s in near]) / np.sqrt(Dh)
        weight = np.exp(scores - scores.max())
        out[b, t, h] = (weight / weight.sum()) @ v[b, near, kv]
  return out


def inputs(lengths, H=4, K=2, Dh=8, seed=0, dtype=jnp.float32):
  """q, k, v, segments, positions of rows that hold documents of these lengths."""
  rng = np.random.default_rng(seed)
  segments = np.array([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths], np.int32)
  positions = np.array([np.concatenate([np.arange(n) for n in row]) for row in lengths], np.int32)
  shape = segments.shape
  arrays = (jnp.asarray(rng.normal(size=(*shape, heads, Dh)), dtype) for heads in (H, K, K))
  return *arrays, jnp.asarray(segments), jnp.asarray(positions)


PACKED = [(5, 60, 3, 1, 40), (50, 59)]  # 109 tokens: an odd length, documents shorter and longer than window and chunk


def close(found, wanted, tolerance=1e-5):
  np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize('window, sink_tokens', [(4, 0), (3, 2), (1, 5)])
def test_oracle_equals_slow_loop(window, sink_tokens):
  args = inputs([(3, 8), (11,)], H=2, K=1)
  wanted = slow_sliding(*map(np.asarray, args), window, sink_tokens)
  close(reference.sliding(*args, window, sink_tokens), wanted)


@pytest.mark.parametrize(
    'window, sink_tokens, lengths',
    [(20, 0, PACKED), (20, 3, PACKED), (6, 9, PACKED), (1, 1, PACKED), (100, 2, PACKED), (500, 4, PACKED),
     (7, 2, [(1,)]), (5, 2, [(6,)]), (16, 1, [(64,)])],
)
def test_chunked_equals_oracle_in_values_and_gradients(window, sink_tokens, lengths):
  q, k, v, segments, positions = inputs(lengths)
  target = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

  def run(function):
    scalar = lambda q, k, v: (
        jnp.sum((y := function(q, k, v, segments, positions, window, sink_tokens)) * target), y
    )
    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))(q, k, v)

  (_, y), gradients = run(sliding.sliding_chunked)
  (_, expected), wanted = run(reference.sliding)
  for one, other in zip((y, *gradients), (expected, *wanted)):
    close(one, other, 2e-5)


@pytest.mark.parametrize(
    'window, start, lengths',
    [(20, None, PACKED), (1, None, [(128,)]), (77, None, [(40, 260), (300,)]), (33, 44, [(40, 260), (300,)]),
     *(pytest.param(*case, marks=pytest.mark.slow) for case in [
         (513, None, [(900, 170, 30)]), (45, 172, [(300,), (160, 140)]), (600, 1, [(250, 50)]),
         (130, 600, [(620, 580)]),
     ])],
)
def test_splash_equals_oracle_in_values_and_gradients(window, start, lengths):
  """In interpret mode; the last document is padding. With `start`, of the queries from there on."""
  q, k, v, segments, positions = inputs(lengths, H=2, K=1, Dh=128)
  segments = jnp.where(segments == jnp.max(segments, axis=1, keepdims=True), 0, segments)
  target = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)[:, start:]
  options = {'start': start, 'interpret': True}
  found = lambda q, k, v: sliding.sliding_splash(q[:, start:], k, v, segments, window, **options)
  wanted = lambda q, k, v: reference.sliding(q, k, v, segments, positions, window)[:, start:]

  def run(function):
    scalar = lambda *qkv: (jnp.sum((y := function(*qkv)) * target), y)
    (_, y), gradients = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return y, *gradients

  for one, other in zip(run(found), run(wanted)):
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * (1 + float(jnp.abs(other).max())))


def test_splash_works_in_bfloat16():
  q, k, v, segments, positions = inputs([(60, 140)], H=2, K=1, Dh=128, dtype=jnp.bfloat16)
  found = sliding.sliding_splash(q, k, v, segments, 33, interpret=True)
  exact = reference.sliding(*(a.astype(jnp.float32) for a in (q, k, v)), segments, positions, 33)
  assert found.dtype == jnp.bfloat16
  assert float(jnp.abs(found - exact).max() / jnp.abs(exact).max()) < 0.02


def test_splash_works_on_the_blocks_that_a_window_reaches_and_no_others():
  """2 of 16 blocks of keys for each block of queries; a window of one key more than a block reaches into a third."""
  slots_nT = np.arange(8192, dtype=np.int32)[None]
  for window, blocks in ((1, 1), (2, 2), (513, 2), (514, 3)):
    kernel = splash.make_kernel(2, slots_nT, 8192, 512, window)
    for tables in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
      assert sorted(tables.block_mask.shape) == sorted((1, 16, blocks))


def test_the_mask_of_a_long_row_is_never_whole():
  """One element tells of a block in which all is alike; of 2**26 blocks none but those on the edges is made."""
  mask = splash.mask_of(window=1024)(np.arange(2**22, dtype=np.int32), 2**22)
  block = lambda row, column: mask[slice(512 * row, 512 * (row + 1)), slice(512 * column, 512 * (column + 1))]
  shapes = [block(4000, column).shape for column in (3990, 3997, 3998, 3999, 4000, 4001)]
  assert shapes == [(1, 1), (1, 1), (512, 512), (1, 1), (512, 512), (1, 1)]
  assert [bool(block(4000, column).all()) for column in (3997, 3999, 4001)] == [False, True, False]


def test_chunked_works_in_bfloat16():
  arrays = inputs(PACKED, Dh=16, dtype=jnp.bfloat16)
  run = lambda function, *args: jax.jit(jax.value_and_grad(
      lambda *qkv: (jnp.sum((y := function(*qkv, *arrays[3:], 20, 2)).astype(jnp.float32) ** 2), y), (0, 1, 2), True
  ))(*args)
  (_, y), gradients = run(sliding.sliding_chunked, *arrays[:3])
  (_, exact), wanted = run(reference.sliding, *(a.astype(jnp.float32) for a in arrays[:3]))
  for one, other in zip((y, *gradients), (exact, *wanted)):
    assert one.dtype == jnp.bfloat16
    assert float(jnp.abs(one - other).max() / jnp.abs(other).max()) < 0.02


@pytest.mark.parametrize('window', [60, 61, 10_000])
def test_a_window_as_long_as_the_documents_is_full_attention(window):
  q, k, v, segments, positions = inputs(PACKED)
  found = jax.jit(sliding.sliding_chunked, static_argnums=5)(q, k, v, segments, positions, window)
  close(found, reference.attention(q, k, v, segments))


def test_packing_isolates_documents_and_their_sinks():
  q, k, v, segments, positions = inputs([(33, 50, 26)])
  run = jax.jit(lambda *args: sliding.sliding_chunked(*args, 12, 3))
  loud = jnp.where(segments == 2, 1.0, 1e8)[..., None, None]
  packed = run(q, k * loud, v * loud, segments, positions)
  close(packed[:, 33:83], run(*(a[:, 33:83] for a in (q, k, v, segments, positions))))


def test_a_document_that_began_before_the_row_has_no_sinks_in_it():
  """Positions start at 40, so that whatever stands first in the row is no sink; or at 1, so that some are."""
  q, k, v, segments, positions = inputs([(30,), (30,)])
  positions = positions + jnp.array([[40], [1]])
  found = jax.jit(lambda *args: sliding.sliding_chunked(*args, 5, 3))(q, k, v, segments, positions)
  close(found, reference.sliding(q, k, v, segments, positions, 5, 3))


@pytest.mark.parametrize('name', ['chunked', 'reference'])
@pytest.mark.parametrize('window, sink_tokens', [(20, 0), (20, 3)])
def test_sliding_is_causal_and_sees_its_window_and_sinks_by_gradient(name, window, sink_tokens):
  q, k, v, segments, positions = inputs([(30, 79)])
  choice = {'window': window, 'sink_tokens': sink_tokens, 'implementation': name, 'platform': 'cpu'}
  function = lambda v, at: jnp.sum(api.sliding(q, k, v, segments, positions, **choice)[0, at])
  slot = np.arange(109)
  for at in (12, 90):
    seen = np.abs(np.asarray(jax.jit(jax.grad(function))(v, at))[0]).sum(axis=(1, 2)) > 0
    begin = 0 if at < 30 else 30
    np.testing.assert_array_equal(
        seen, (slot >= begin) & (slot <= at) & ((slot > at - window) | (slot < begin + sink_tokens))
    )


@pytest.mark.parametrize('name', ['chunked', 'reference'])
@pytest.mark.parametrize('window, sink_tokens', [(12, 0), (12, 3), (40, 2)])
def test_past_chains_two_halves_to_the_whole(name, window, sink_tokens):
  """Past keys in any order, with empty slots, and stale ones at the cut and behind it; rows cut at different places."""
  q, k, v, _, _ = inputs([(60,), (60,)])
  cuts, T = np.array([0, 25]), 35
  ones, positions = jnp.ones((2, 60), jnp.int32), jnp.arange(60)[None] + jnp.zeros((2, 1), jnp.int32)
  whole = reference.sliding(q, k, v, ones, positions, window, sink_tokens)
  take = lambda a: jnp.stack([a[row, cut : cut + T] for row, cut in enumerate(cuts)])
  order = np.random.default_rng(2).permutation(60)
  kept = np.where((order < sink_tokens) | (order > cuts[:, None] - window), order, -1)
  past = k[:, order], v[:, order], jnp.asarray(kept, jnp.int32)
  choice = {'window': window, 'sink_tokens': sink_tokens, 'implementation': name, 'platform': 'cpu'}
  run = jax.jit(lambda q, k, v, positions: api.sliding(q, k, v, ones[:, :T], positions, past=past, **choice))
  close(run(*map(take, (q, k, v, positions))), take(whole))


@pytest.mark.parametrize('window, sink_tokens', [(12, 0), (12, 3)])
def test_slots_in_any_order_equal_the_oracle(window, sink_tokens):
  q, k, v, segments, positions = inputs([(60,), (60,)])
  whole = reference.sliding(q, k, v, segments, positions, window, sink_tokens)
  order = np.random.default_rng(2).permutation(60)
  at = np.array([7, 41])
  slots = jnp.asarray(np.where(order <= at[:, None], order, -1), jnp.int32)
  choice = {'window': window, 'sink_tokens': sink_tokens}
  now = jnp.asarray(at, jnp.int32)[:, None]
  pick = lambda a: jnp.take_along_axis(a, now[:, :, None, None], axis=1)
  close(api.sliding_slots(pick(q), k[:, order], v[:, order], slots, now, **choice), pick(whole))


def multiplications(function, *args):
  """Of all matrix products in a trace, those inside loops times their trips."""
  def count(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
      trips = equation.params.get('length', 1) if equation.primitive.name == 'scan' else 1
      if equation.primitive.name == 'dot_general':
        (contracted, _), _ = equation.params['dimension_numbers']
        depth = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
        total += equation.outvars[0].aval.size * depth
      for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, 'eqns')):
        if hasattr(inner, 'eqns'):
          total += trips * count(getattr(inner, 'jaxpr', inner))
    return total

  return count(jax.make_jaxpr(function)(*args).jaxpr)


def test_cost_of_a_token_knows_nothing_of_the_context_beyond_the_window():
  def cost(T, sink_tokens):
    q, k, v, segments, positions = inputs([(T,)], H=2, K=1)
    scalar = lambda q, k, v: jnp.sum(sliding.sliding_chunked(q, k, v, segments, positions, 64, sink_tokens))
    return multiplications(jax.grad(scalar, (0, 1, 2)), q, k, v) / T

  # For each of 2 heads, two products forward and five backward, 8 deep, with the keys that a chunk of 16 meets.
  assert cost(1024, 0) == cost(4096, 0) == 7 * 2 * 8 * (64 + 16 - 1)
  assert cost(4096, 4) == 7 * 2 * 8 * (64 + 16 - 1 + 4)


REFUSED = [
    ('serves no sink tokens, got 2', {'sink_tokens': 2}),
    ('needs head_dim in multiples of 128, got 64', {'Dh': 64}),
    ('needs to know where the queries begin as the program is built', {'start': jnp.int32(4)}),
    ('not for cpu', {'platform': 'cpu'}),
]


def choose(implementation, sink_tokens=0, past=False, start=None, Dh=128, platform='tpu'):
  """Calls the api with shapes alone; whether a kernel is in what it makes."""
  q, k, v, segments, positions = inputs([(8,)], Dh=Dh, dtype=jnp.bfloat16)
  choice = {'window': 4, 'sink_tokens': sink_tokens, 'implementation': implementation, 'platform': platform}
  function = lambda q, k, v, start: api.sliding(
      q if start is None else q[:, 4:], k, v, segments, positions, past=(k, v, positions - 8) if past else None,
      start=start, **choice,
  )
  if isinstance(start, jax.Array):
    made = jax.make_jaxpr(function)(q, k, v, start)
  else:
    made = jax.make_jaxpr(lambda *qkv: function(*qkv, start))(q, k, v)
  return re.search('pallas_call|wgmma', str(made)) is not None


@pytest.mark.parametrize('start', [None, 4])
def test_auto_takes_splash_on_tpu(start):
  assert choose('auto', start=start) and choose('splash', start=start)


@pytest.mark.parametrize('reason, what', REFUSED)
def test_what_splash_cannot_serve_is_said_and_auto_takes_what_can(reason, what, monkeypatch):
  said = []
  monkeypatch.setattr(api, '_log_once', said.append)
  platform, ours = what.get('platform', 'tpu'), isinstance(what.get('start'), jax.Array)
  assert choose('auto', **what) == ours
  begins = f'sliding: {"pallas" if ours else "chunked"} on {platform}'
  assert len(said) == 1 and said[0].startswith(begins + (f'; not splash: {reason}' if platform == 'tpu' else ''))
  assert ('not pallas' in said[0]) == (platform == 'tpu' and not ours)
  with pytest.raises(api.UnsupportedError, match=f"'splash' cannot be used here: {reason}"):
    choose('splash', **what)


@pytest.mark.parametrize('implementation, platform', [
    ('auto', 'tpu'), ('splash', 'tpu'), ('pallas', 'tpu'), ('hopper', 'gpu'),
])
def test_a_prompt_behind_a_cache_is_served_in_chunks_whatever_kernel_is_named(implementation, platform):
  assert choose(implementation, platform=platform)
  assert not choose(implementation, platform=platform, past=True)


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_auto_choice_lowers_for_accelerators_on_a_cpu_host(platform):
  q, k, v, segments, positions = inputs(PACKED, dtype=jnp.bfloat16)
  choice = {'implementation': 'auto', 'platform': {'cuda': 'gpu'}.get(platform, platform)}
  function = lambda *qkv: jnp.sum(
      api.sliding(*qkv, segments, positions, window=20, sink_tokens=2, **choice).astype(jnp.float32)
  )
  assert jax.jit(jax.grad(function, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()
