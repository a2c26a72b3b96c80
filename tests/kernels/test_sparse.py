"""MiniMax Sparse Attention: the gathering form equals the oracle, the oracle a slow loop; nothing grows with S^2."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.kernels_pallas import api, reference, sparse

GATHER = {'implementation': 'gather', 'platform': 'cpu'}


def inputs(B, T, H, K, Dh, Di, seed=0, dtype=jnp.float32):
  """q, k, v, index_q, index_k, segment_ids: packed documents, the last row padded at its end."""
  rng = np.random.default_rng(seed)
  segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
  segments[-1, T - T // 5 :] = 0
  shapes = (B, T, H, Dh), (B, T, K, Dh), (B, T, K, Dh), (B, T, K, Di), (B, T, Di)
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes) + (jnp.asarray(segments),)


def causal(B, T):
  return jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))


# ----------------------------------------------------------------------------------------------------------------------
# one query and kv head at a time, float64


def softmax(scores):
  weight = np.exp(scores - scores.max(-1, keepdims=True))
  return weight / weight.sum(-1, keepdims=True)


def slow_queries(q, k, index_q, index_k, segments, block, top_k):
  """(b, t, head, ids by score, visible tokens, index scores on them, attention scores [G, tokens])."""
  B, T, H, Dh = q.shape
  K = k.shape[2]
  for b, t, head in np.ndindex(B, T, K):
    seen = np.array([s for s in range(t + 1) if segments[b, s] == segments[b, t]])
    index = (index_k[b, seen] @ index_q[b, t, head]) / np.sqrt(index_q.shape[-1])
    best = {int(block_id): index[seen // block == block_id].max() for block_id in seen // block}
    best[t // block] = np.inf
    ids = sorted(best, key=lambda block_id: (-best[block_id], block_id))[:top_k]
    group = q[b, t, head * (H // K) : (head + 1) * (H // K)]
    yield b, t, head, ids, seen, index, group @ k[b, seen, head].T / np.sqrt(Dh)


def slow_msa(q, k, v, index_q, index_k, segments, block, top_k):
  """out, kl [B], kl over the whole prefix [B], ids, block recall and score recall [B, T, K]."""
  B, T, H, Dh = q.shape
  K = k.shape[2]
  G = H // K
  out, kl, prefix_kl, ids = np.zeros(q.shape), np.zeros(B), np.zeros(B), np.full((B, T, K, top_k), -1)
  recalls = np.zeros((2, B, T, K))
  divergence = lambda teacher, student: np.sum(teacher * (np.log(teacher) - np.log(student)))
  for b, t, head, chosen, seen, index, scores in slow_queries(q, k, index_q, index_k, segments, block, top_k):
    ids[b, t, head, : len(chosen)] = chosen
    kept = np.isin(seen // block, chosen)
    weight = softmax(scores[:, kept])
    out[b, t, head * G : (head + 1) * G] = weight @ v[b, seen[kept], head]
    full = softmax(scores).mean(0)
    if segments[b, t] > 0:
      kl[b] += divergence(weight.mean(0), softmax(index[kept]))
      prefix_kl[b] += divergence(full, softmax(index))
    mass = {block_id: full[seen // block == block_id].sum() for block_id in set(seen // block)}
    best = sorted(mass, key=lambda block_id: -mass[block_id])[:top_k]
    recalls[:, b, t, head] = len(set(best) & set(chosen)) / len(best), full[kept].sum()
  return out, kl, prefix_kl, ids, *recalls


def test_oracles_equal_the_slow_loop():
  args = inputs(2, 23, 4, 2, 8, 4)
  q, k, _, index_q, index_k, segments = args
  floats = (np.asarray(a, np.float64) for a in args[:5])
  out, kl, prefix_kl, ids, *recalls = slow_msa(*floats, np.asarray(segments), 4, 3)
  np.testing.assert_array_equal(reference.msa_select(index_q, index_k, segments, 4, 3), ids)
  for got, want in zip(reference.msa(*args, 4, 3), (out, kl)):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(reference.msa_prefix_kl(q, k, index_q, index_k, segments), prefix_kl, rtol=1e-4)
  for got, want in zip(reference.msa_recall(q, k, index_q, index_k, segments, 4, 3), recalls):
    np.testing.assert_allclose(got, want, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# the gathering form


def value_and_gradients(function, args):
  """(out, kl) and the gradients of a weighted sum of all of it, each row's kl by another weight."""
  rng = np.random.default_rng(1)
  target = jnp.asarray(rng.normal(size=args[0].shape), jnp.float32)
  weight = jnp.asarray(rng.normal(size=args[0].shape[0]), jnp.float32)

  def scalar(*floats):
    out, kl = function(*floats, args[-1])
    return jnp.sum(out.astype(jnp.float32) * target) + jnp.sum(kl * weight), (out, kl)

  (_, outs), gradients = jax.jit(jax.value_and_grad(scalar, argnums=range(len(args) - 1), has_aux=True))(*args[:-1])
  return (*outs, *gradients)


SHAPES = [
    # B, T, H, K, Dh, Di, block, k
    (2, 37, 4, 2, 8, 8, 4, 3),  # the last block is not whole
    (1, 64, 4, 4, 8, 4, 8, 20),  # more k than blocks, one head a group
    (2, 50, 4, 1, 16, 8, 16, 2),  # four heads a group
    (2, 41, 3, 1, 4, 4, 5, 1),  # its own block alone
    (2, 5, 2, 2, 4, 4, 8, 2),  # less than one block
]


@pytest.mark.parametrize('shape', SHAPES)
def test_msa_gather_equals_oracle_in_values_and_gradients(shape):
  *shape, block, top_k = shape
  args = inputs(*shape)
  got = value_and_gradients(lambda *a: api.msa(*a, block_size=block, top_k=top_k, **GATHER), args)
  for g, want in zip(got, value_and_gradients(lambda *a: reference.msa(*a, block, top_k), args)):
    np.testing.assert_allclose(g, want, rtol=1e-4, atol=2e-5 * float(jnp.abs(want).max()))


def test_msa_gather_in_many_chunks_and_batches_equals_oracle(monkeypatch):
  for name, value in {'SPAN': 16, 'SELECT_ELEMENTS': 700, 'CHUNK_ELEMENTS': 3000, 'TILE_ROWS': 8,
                      'BATCH_ELEMENTS': 100}.items():
    monkeypatch.setattr(sparse, name, value)
  args = inputs(2, 75, 4, 2, 8, 4)
  assert sparse._chunk_length(args[0], 3) < 20
  got = value_and_gradients(lambda *a: sparse.msa_gather(*a, 4, 3), args)
  for g, want in zip(got, value_and_gradients(lambda *a: reference.msa(*a, 4, 3), args)):
    np.testing.assert_allclose(g, want, rtol=1e-4, atol=2e-5 * float(jnp.abs(want).max()))


def test_msa_gather_in_bfloat16_is_as_near_to_float32_as_the_oracle():
  """On the same blocks: bfloat16 index queries and keys, exact in float32, so that selection cannot differ."""
  args = inputs(2, 48, 4, 2, 16, 8, dtype=jnp.bfloat16)
  exact = value_and_gradients(lambda *a: reference.msa(*a, 8, 3), (*(a.astype(jnp.float32) for a in args[:5]), args[5]))
  got = value_and_gradients(lambda *a: sparse.msa_gather(*a, 8, 3), args)
  assert [g.dtype for g in got] == [jnp.bfloat16, jnp.float32] + [jnp.bfloat16] * 5
  for g, want in zip(got, exact):
    np.testing.assert_allclose(g.astype(jnp.float32), want, rtol=0.03, atol=0.02 * float(jnp.abs(want).max()))


def test_msa_gather_is_deterministic():
  args = inputs(2, 90, 4, 2, 8, 4)
  run = jax.jit(lambda *a: value_and_gradients(lambda *x: sparse.msa_gather(*x, 4, 3), a))
  for one, other in zip(run(*args), run(*args)):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('T, heads', [(37, (4, 2)), (200, (4, 1)), (5, (2, 2))])
def test_prefix_kl_equals_oracle_and_moves_only_the_index_branch(T, heads):
  q, k, _, *index = inputs(2, T, *heads, 8, 4)
  args = q, k, *index
  with_out = lambda function: lambda *a: (jnp.zeros_like(q), function(*a))
  got = value_and_gradients(with_out(functools.partial(api.msa_prefix_kl, implementation='gather')), args)[1:]
  for g, want in zip(got, value_and_gradients(with_out(reference.msa_prefix_kl), args)[1:]):
    np.testing.assert_allclose(g, want, rtol=1e-4, atol=2e-5 * float(jnp.abs(want).max()))
  assert not got[1].any() and not got[2].any() and got[3].any() and got[4].any()


def test_prefix_kl_in_many_chunks_equals_oracle(monkeypatch):
  monkeypatch.setattr(sparse, 'PREFIX_ELEMENTS', 3000)
  q, k, _, *index = inputs(1, 120, 4, 2, 8, 4)
  np.testing.assert_allclose(
      sparse.msa_prefix_kl_gather(q, k, *index), reference.msa_prefix_kl(q, k, *index), rtol=1e-5
  )


@pytest.mark.parametrize('T', [20, 100])
def test_recall_of_a_sample_is_the_mean_of_the_oracle_on_it(T):
  q, k, _, *index = inputs(2, T, 4, 2, 8, 4)
  stride = -(-T // sparse.RECALL_QUERIES)
  sampled = (np.arange(T) % stride == (T - 1) % stride)[None] & (np.asarray(index[-1]) > 0)
  got = api.msa_recall(q, k, *index, block_size=4, top_k=3)
  for g, want in zip(got, reference.msa_recall(q, k, *index, 4, 3)):
    np.testing.assert_allclose(g, np.asarray(want)[sampled].mean(), rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# selection


@pytest.mark.parametrize('shape', SHAPES)
def test_selection_equals_oracle(shape):
  *shape, block, top_k = shape
  *_, index_q, index_k, segments = inputs(*shape)
  got = sparse.select_blocks(index_q, index_k, causal(*shape[:2]), (segments, segments), block, top_k)
  np.testing.assert_array_equal(got, reference.msa_select(index_q, index_k, segments, block, top_k))


def test_ties_go_to_the_lower_block_after_the_own_block():
  index_q, index_k = jnp.ones((1, 24, 1, 2)), jnp.ones((1, 24, 2))
  ids = sparse.select_blocks(index_q, index_k, causal(1, 24), None, 4, 3)[0, :, 0]
  assert ids[23].tolist() == [5, 0, 1] and ids[5].tolist() == [1, 0, -1] and ids[0].tolist() == [0, -1, -1]
  oracle = reference.msa_select(index_q, index_k, jnp.ones((1, 24), jnp.int32), 4, 3)
  np.testing.assert_array_equal(oracle[0, :, 0], ids)


def test_selection_contains_the_own_block_even_when_it_scores_worst():
  T, block = 40, 4
  index_k = -jnp.arange(T, dtype=jnp.float32)[None, :, None]
  ids = sparse.select_blocks(jnp.ones((1, T, 2, 1)), index_k, causal(1, T), None, block, 2)
  np.testing.assert_array_equal(ids[0, :, :, 0], np.broadcast_to(np.arange(T)[:, None] // block, (T, 2)))


# ----------------------------------------------------------------------------------------------------------------------
# what it means


@pytest.mark.parametrize('name', ['gather', 'reference'])
def test_msa_with_k_of_all_blocks_equals_full_attention(name):
  args = inputs(2, 45, 4, 2, 8, 4)
  run = lambda function: value_and_gradients(function, (*args[:3], args[5]))
  msa = lambda q, k, v, segments: (
      api.msa(q, k, v, *args[3:5], segments, block_size=8, top_k=6, implementation=name, platform='cpu')[0],
      jnp.zeros(2),
  )
  for got, want in zip(run(msa), run(lambda *a: (reference.attention(*a), jnp.zeros(2)))):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * max(1, float(jnp.abs(want).max())))


@pytest.mark.parametrize('name', ['gather', 'reference'])
def test_attention_moves_only_the_main_branch_and_divergence_only_the_index_branch(name):
  args = inputs(2, 40, 4, 2, 8, 4)
  function = functools.partial(api.msa, block_size=4, top_k=3, implementation=name, platform='cpu')
  for output, moved in ((0, (0, 1, 2)), (1, (3, 4))):
    gradients = jax.grad(lambda *a: jnp.sum(function(*a, args[5])[output] ** 2), range(5))(*args[:5])
    assert {i for i, gradient in enumerate(gradients) if jnp.any(gradient != 0)} == set(moved)


@pytest.mark.parametrize('name', ['gather', 'reference'])
def test_msa_is_causal_and_keeps_to_its_document_by_gradient(name):
  args = inputs(1, 60, 2, 1, 8, 4)
  segments, at = np.asarray(args[5])[0], 37
  function = functools.partial(api.msa, block_size=4, top_k=3, implementation=name, platform='cpu')
  gradient = np.asarray(jax.grad(lambda v: jnp.sum(function(*args[:2], v, *args[3:])[0][0, at]))(args[2]))[0]
  assert np.all(gradient[at + 1 :] == 0) and np.all(gradient[segments != segments[at]] == 0)
  assert np.all(np.abs(gradient[at]) > 0)


def test_cached_attention_equals_training_for_rows_of_different_lengths():
  """Two rows at different slots, each one document; slot -1 is padding."""
  T, block, top_k = 43, 4, 3
  q, k, v, index_q, index_k, _ = inputs(2, T, 4, 2, 8, 4)
  want = reference.msa(q, k, v, index_q, index_k, jnp.ones((2, T), jnp.int32), block, top_k)[0]
  beyond = lambda a: jnp.concatenate([a, jnp.full((2, 21, *a.shape[2:]), 1e3)], axis=1)  # slots never to be seen
  cached = lambda a: beyond(a).swapaxes(1, 2)
  for slots in ([[20, 21, 22, 23, 24], [38, 39, 40, -1, -1]], [[42], [3]], [[0], [-1]]):
    slots = jnp.asarray(slots, jnp.int32)
    pick = lambda a: jnp.take_along_axis(a, jnp.maximum(slots, 0)[..., None, None], axis=1)
    got = api.msa_cached(
        pick(q), cached(k), cached(v), pick(index_q), beyond(index_k), slots, block_size=block, top_k=top_k, **GATHER
    )
    np.testing.assert_allclose(got, jnp.where((slots >= 0)[..., None, None], pick(want), 0), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# what it costs


def largest_array(function, *args):
  """Elements of the largest array of a traced function, loops and branches included."""

  def sizes(jaxpr):
    for equation in jaxpr.eqns:
      yield from (variable.aval.size for variable in equation.outvars)
      for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
        if hasattr(inner, 'eqns'):
          yield from sizes(getattr(inner, 'jaxpr', inner))

  return max(sizes(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.parametrize('what', ['training', 'warm-up', 'recall', 'cache'])
def test_no_array_grows_with_the_square_of_the_length(what):
  choice = {'block_size': 16, 'top_k': 4}

  def largest(T):
    floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in
              ((1, T, 4, 8), (1, T, 2, 8), (1, T, 2, 8), (1, T, 2, 8), (1, T, 8))]
    ints = jax.ShapeDtypeStruct((1, T), jnp.int32)
    q, k, v, index_q, index_k = floats
    if what == 'training':
      total = lambda *a: sum(jnp.sum(out) for out in api.msa(*a, **choice, **GATHER))
      return largest_array(jax.grad(total, range(5)), *floats, ints)
    if what == 'warm-up':
      total = lambda *a: jnp.sum(api.msa_prefix_kl(*a, implementation='gather'))
      return largest_array(jax.grad(total, range(4)), q, k, index_q, index_k, ints)
    if what == 'recall':
      return largest_array(functools.partial(api.msa_recall, **choice), q, k, index_q, index_k, ints)
    cached = jax.ShapeDtypeStruct((1, 2, T, 8), jnp.float32)
    decode = functools.partial(api.msa_cached, **choice, **GATHER)
    return largest_array(decode, q, cached, cached, index_q, index_k, ints)

  assert largest(2**19) <= 2.01 * largest(2**18) + sparse.CHUNK_ELEMENTS
  assert largest(2**20) < 2**20 * 1000  # 2^40 would be the square
