"""Expert parallel = single device: values and gradients, every transport, whatever the load.

B=8 rows of T=7 tokens, D=6, F=4, E=16. The oracle multiplies every token with every expert and knows no transport.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from mmx import sharding
from mmx.config import ConfigError, MeshConfig, MoEConfig
from mmx.kernels_pallas import grouped
from mmx.layers import moe_transport
from mmx.layers.moe import MoE
from mmx.layers.moe_transport import TRANSPORTS, Experts, expert_parallel

B, T, D, F, E = 8, 7, 6, 4, 16
MESHES = {'fsdp2_expert4': (1, 2, 4, 1), 'expert8': (1, 1, 8, 1), 'replica2_expert2_tensor2': (2, 1, 2, 2),
          'fsdp2_expert2_tensor2': (1, 2, 2, 2)}
LOADS = ['uneven', 'half_empty', 'one_hot_expert', 'one_shard']


def build_mesh(replica=1, fsdp=1, expert=1, tensor=1, context=1):
  sizes = MeshConfig(replica, fsdp, expert, tensor, context)
  return sharding.build_mesh(sizes, jax.devices()[: replica * fsdp * expert * tensor * context])


def dense_experts(x_ND, ids_Nk, weights_Nk, w_gate_EDF, w_up_EDF, w_down_EFD, most=0):
  """Every expert on every token; an id past the last expert finds none."""
  here_NkE = jax.nn.one_hot(ids_Nk, w_down_EFD.shape[0], dtype=jnp.bool_)
  weights_NE = jnp.where(here_NkE, weights_Nk[:, :, None], 0).sum(axis=1)
  gate_NEF, up_NEF = (jnp.einsum('nd,edf->nef', x_ND, w_EDF) for w_EDF in (w_gate_EDF, w_up_EDF))
  hidden_NEF = jax.nn.silu(gate_NEF) * up_NEF
  return jnp.einsum('nef,efd,ne->nd', hidden_NEF, w_down_EFD, weights_NE.astype(x_ND.dtype))


def dense_rows(x_QD, weight_Q1, group_sizes_E, *matrices):
  ids_Q1 = jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(x_QD.shape[0]), side='right')[:, None]
  return dense_experts(x_QD, ids_Q1, weight_Q1, *matrices)


DENSE = Experts(dense_experts, dense_rows)
LOOP = Experts(grouped.experts_loop, functools.partial(grouped.loop_on_rows, activation='swiglu'))


def draw_ids(load, k, seed=0):
  """int32 [B, T, k], distinct within a token."""
  rng = np.random.default_rng(seed)
  score_BTE = rng.normal(size=(B, T, E)) + {'uneven': np.linspace(0, 3, E),
                                           'half_empty': np.where(np.arange(E) % 2, 0, -99) if k <= E // 2 else 0,
                                           'one_hot_expert': np.where(np.arange(E) == 5, 99, 0),
                                           'one_shard': np.where(np.arange(E) >= E - max(k, 2), 99, 0)}[load]
  return jnp.asarray(np.argsort(-score_BTE, axis=-1)[..., :k], jnp.int32)


def draw(k, dtype=jnp.float32, load='uneven', D=D, F=F):
  """(x, ids, weights, w_gate, w_up, w_down), and the cotangent of y."""
  rng = np.random.default_rng(1)

  def array(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  weights_BTk = jnp.asarray(rng.uniform(.1, 1, (B, T, k)), jnp.float32)
  matrices = array(E, D, F), array(E, D, F), array(E, F, D)
  return (array(B, T, D), draw_ids(load, k), weights_BTk, *matrices), array(B, T, D)


def single_device(x_BTD, ids_BTk, weights_BTk, *matrices):
  flat = (a.reshape(B * T, -1) for a in (x_BTD, ids_BTk, weights_BTk))
  return dense_experts(*flat, *matrices).reshape(x_BTD.shape)


@jax.jit
def oracle(args, dy_BTD):
  return value_and_grads(lambda *args: (single_device(*args), jnp.zeros(())), args, dy_BTD)


def value_and_grads(function, args, dy_BTD):
  """(y, dropped, {name: gradient}) of sum(y * dy)."""
  def loss(x, weights, *matrices):
    y, dropped = function(x, args[1], weights, *matrices)
    return (y * dy_BTD).astype(jnp.float32).sum(), (y, dropped)
  grads, (y, dropped) = jax.grad(loss, argnums=range(5), has_aux=True)(args[0], *args[2:])
  return y, dropped, dict(zip(('x', 'weights', 'w_gate', 'w_up', 'w_down'), grads, strict=True))


def quick_jit(function):
  """Unoptimised code: these shapes cost a second to compile and a millisecond to run."""
  return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0})


@functools.cache
def parallel(mesh_shape, transport, capacity_factor=0.0, experts=DENSE):
  """The production function, jitted with its gradients."""
  run = functools.partial(expert_parallel, mesh=build_mesh(*mesh_shape), transport=transport,
                          capacity_factor=capacity_factor, experts=experts)
  return quick_jit(functools.partial(value_and_grads, run))


def assert_close(got, want, tolerance):
  """Largest difference relative to the largest value, of y and each gradient."""
  for name, a, b in [('y', got[0], want[0])] + [(name, got[2][name], want[2][name]) for name in want[2]]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = np.abs(a - b).max() / np.abs(b).max()
    assert error < tolerance, f'{name}: {error:.2e}'  # NaN fails too


def capacity_by_hand(ids_BTk, batch_shards, capacity_factor):
  """kept [B, T, k] by walking over the tokens of each shard in order."""
  ids_BTk = np.asarray(ids_BTk)
  kept_BTk = np.zeros(ids_BTk.shape, bool)
  rows, k = B // batch_shards, ids_BTk.shape[2]
  capacity = math.ceil(capacity_factor * rows * T * k / E)
  for shard in range(batch_shards):
    load = [0] * E
    for b, t, j in np.ndindex(rows, T, k):
      expert = ids_BTk[shard * rows + b, t, j]
      kept_BTk[shard * rows + b, t, j] = load[expert] < capacity
      load[expert] += 1
  return kept_BTk


# ---- expert parallel = single device ---------------------------------------------------------------------------------


@pytest.mark.parametrize('transport', TRANSPORTS)
@pytest.mark.parametrize('mesh', MESHES)
def test_expert_parallel_equals_single_device(mesh, transport):
  for load in LOADS:
    args, dy = draw(k=3, load=load)
    got = parallel(MESHES[mesh], transport)(args, dy)
    assert_close(got, oracle(args, dy), 1e-5)
    assert got[1] == 0


@pytest.mark.parametrize('transport', TRANSPORTS)
@pytest.mark.parametrize('mesh,k', [('fsdp2_expert4', 1), ('expert8', 8)])
def test_expert_parallel_equals_single_device_for_one_and_eight_experts_per_token(mesh, k, transport):
  for load in LOADS:
    args, dy = draw(k, load=load)
    assert_close(parallel(MESHES[mesh], transport)(args, dy), oracle(args, dy), 1e-5)


@pytest.mark.parametrize('mesh,transport', [('fsdp2_expert4', 'ring'), ('fsdp2_expert2_tensor2', 'padded'),
                                            ('expert8', 'ragged')])
def test_transports_carry_the_grouped_product(mesh, transport):
  """Its loop runs as long as a shard has work: shards with none, and rows of no expert, must leave zeros."""
  for load in LOADS:
    args, dy = draw(k=3, load=load)
    got = parallel(MESHES[mesh], transport, experts=LOOP)(args, dy)
    assert_close(got, oracle(args, dy), 1e-5)


@pytest.mark.parametrize('transport, capacity_factor', [('ragged', 0.0), ('direct', 0.0), ('direct', 0.5)])
def test_rows_that_nobody_sent_may_hold_nan(transport, capacity_factor, monkeypatch):
  """As on TPU: rows arrive in memory that nobody has written to, and the grouped product leaves such memory too."""
  monkeypatch.setattr(moe_transport, 'anything', lambda shape, dtype, *_: jnp.full(shape, jnp.nan, dtype))
  megablox = functools.partial(grouped.megablox, groups=E // 4, interpret=True)
  rows = lambda x_QD, *arguments: grouped.products(x_QD, *arguments, 'swiglu', megablox(x_QD.shape[0]))
  of_tokens = functools.partial(grouped.experts_megablox, interpret=True)
  run = parallel.__wrapped__(MESHES['fsdp2_expert4'], transport, capacity_factor, Experts(of_tokens, rows))
  for load in 'half_empty', 'one_shard':
    args, dy = draw(k=3, load=load, D=128, F=128)
    kept_BTk = capacity_by_hand(args[1], 8, capacity_factor) if capacity_factor else np.ones(args[1].shape, bool)
    got = run(args, dy)
    args = *args[:2], jnp.where(kept_BTk, args[2], 0), *args[3:]
    want = value_and_grads(lambda *args: (single_device(*args), jnp.zeros(())), args, dy)
    want[2]['weights'] = jnp.where(kept_BTk, want[2]['weights'], 0)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize('transport', TRANSPORTS)
def test_under_a_capacity_no_more_rows_than_fit_are_kept_for_the_experts_and_none_is_lost(transport):
  args, dy = draw(k=3, load='one_shard')
  kept = []

  def bounded(x_ND, ids_Nk, weights_Nk, *matrices, most):
    kept.append((most, ids_Nk.size))
    return grouped.experts_loop(x_ND, ids_Nk, weights_Nk, *matrices, 'swiglu', most)

  capacity_factor, mesh = 0.5, MESHES['fsdp2_expert4']
  got = parallel(mesh, transport, capacity_factor, experts=Experts(bounded, LOOP.of_rows))(args, dy)
  want = parallel(mesh, transport, capacity_factor)(args, dy)
  assert_close(got, want, 1e-5)
  assert got[1] == want[1] > 0
  assert all(most == E * math.ceil(capacity_factor * B * T // 8 * 3 / E) < rows for most, rows in kept)


@pytest.mark.parametrize('transport', TRANSPORTS)
def test_moe_layer_on_a_mesh_equals_the_layer_on_one_device(transport):
  config = MoEConfig(num_experts=E, top_k=3, d_ff=F, transport=transport)
  (x_BTD, *_), dy_BTD = draw(k=3)
  valid_BT = jnp.ones((B, T), bool)
  alone = MoE(config, 'swiglu', 1.0, None)
  variables = nn.unbox(quick_jit(alone.init)(jax.random.key(0), x_BTD, valid_BT))

  def gradients(layer):
    def loss(params, x):
      y_BTD, aux = layer.apply({**variables, 'params': params}, x, valid_BT)
      return (y_BTD * dy_BTD).sum(), (y_BTD, aux)
    return quick_jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables['params'], x_BTD)

  wanted, got = gradients(alone), gradients(MoE(config, 'swiglu', 1.0, build_mesh(fsdp=2, expert=2, tensor=2)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), got, wanted)


@pytest.mark.parametrize('transport', TRANSPORTS)
def test_nothing_is_sent_to_be_routed_nor_summed_over_axes_of_one_part(transport):
  layer = MoE(MoEConfig(num_experts=E, top_k=3, d_ff=F, transport=transport), 'swiglu', 1.0, build_mesh(expert=2))
  (x_BTD, *_), dy_BTD = draw(k=3)
  valid_BT = jnp.ones((B, T), bool)
  rows = NamedSharding(layer.mesh, sharding.batch_spec())
  x_BTD, dy_BTD = jax.device_put((x_BTD, dy_BTD), rows)
  variables = nn.unbox(quick_jit(layer.init)(jax.random.key(0), x_BTD, valid_BT))
  loss = lambda params, x: (layer.apply({**variables, 'params': params}, x, valid_BT)[0] * dy_BTD).sum()
  text = quick_jit(jax.grad(loss, argnums=(0, 1))).lower(variables['params'], x_BTD).compile().as_text()
  assert 'replica_groups={{0},{1}}' not in text
  assert not re.search(r'(all-gather|all-reduce)\(.*/top_k"', text)


def test_gradients_of_matrices_are_scattered_as_they_are_summed():
  mesh = build_mesh(expert=2, fsdp=2)
  args, dy = draw(k=3)
  text = parallel((1, 2, 2, 1), 'ring').lower(args, dy).compile().as_text()
  shards = mesh.shape['fsdp']
  assert len(re.findall(rf'= f32\[{E // 2},({D // shards},{F}|{F // shards},{D})\]\S* reduce-scatter', text)) == 3
  assert not re.search(rf'= f32\[{E // 2},({D},{F}|{F},{D})\]\S* all-reduce', text)


def test_without_expert_axis_experts_stay_where_they_are():
  args, dy = draw(k=3)
  assert_close(parallel((2, 2, 1, 2), 'ring')(args, dy), oracle(args, dy), 1e-5)


@pytest.mark.parametrize('transport', TRANSPORTS)
def test_bfloat16_rounds_like_single_device(transport):
  args, dy = draw(k=3, dtype=jnp.bfloat16)
  exact = oracle(jax.tree.map(lambda a: a if a.dtype == jnp.int32 else a.astype(jnp.float32), args),
                 dy.astype(jnp.float32))
  got = parallel((1, 2, 2, 2), transport)(args, dy)
  assert got[0].dtype == jnp.bfloat16 and got[2]['w_down'].dtype == jnp.bfloat16
  assert got[2]['weights'].dtype == jnp.float32
  assert_close(got, exact, 4e-2)


@pytest.mark.parametrize('transport', TRANSPORTS)
def test_checkpointed_scan_of_layers_equals_unrolled_single_device(transport):
  args, dy = draw(k=3)
  run = functools.partial(expert_parallel, mesh=build_mesh(fsdp=2, expert=4), transport=transport, capacity_factor=0.0,
                          experts=DENSE)

  def scanned(x, ids, weights, *matrices):
    layer = jax.checkpoint(lambda x, scale: (x + run(x, ids, weights * scale, *matrices)[0], None))
    return jax.lax.scan(layer, x, jnp.array([.1, .05]))[0], jnp.zeros(())

  def unrolled(x, ids, weights, *matrices):
    for scale in (.1, .05):
      x = x + single_device(x, ids, weights * scale, *matrices)
    return x, jnp.zeros(())

  assert_close(quick_jit(functools.partial(value_and_grads, scanned))(args, dy),
               quick_jit(functools.partial(value_and_grads, unrolled))(args, dy), 1e-5)


def test_repeated_runs_are_bitwise_equal():
  args, dy = draw(k=3)
  run = parallel(MESHES['fsdp2_expert4'], 'padded')
  jax.tree.map(np.testing.assert_array_equal, run(args, dy), run(args, dy))


# ---- capacity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('mesh,transport', [('expert8', name) for name in TRANSPORTS] + [
    ('fsdp2_expert2_tensor2', 'ragged'), ('fsdp2', 'ring')])
def test_capacity_means_the_same_for_every_transport(mesh, transport):
  shape = MESHES.get(mesh, (1, 2, 1, 1))
  for load in LOADS:
    args, dy = draw(k=3, load=load)
    kept_BTk = capacity_by_hand(args[1], math.prod(shape[:3]), 0.8)
    assert 0 < kept_BTk.mean() < 1
    limited = (args[0], jnp.where(kept_BTk, args[1], E), *args[2:])
    got = parallel(shape, transport, 0.8)(args, dy)
    assert_close(got, oracle(limited, dy), 1e-5)
    np.testing.assert_allclose(got[1], 1 - kept_BTk.mean(), rtol=1e-6)


def test_single_device_capacity_is_that_of_one_shard():
  args, dy = draw(k=3)
  kept_BTk = capacity_by_hand(args[1], 1, 0.8)
  got = parallel((1, 1, 1, 1), 'ring', 0.8)(args, dy)
  assert_close(got, oracle((args[0], jnp.where(kept_BTk, args[1], E), *args[2:]), dy), 1e-5)
  np.testing.assert_allclose(got[1], 1 - kept_BTk.mean(), rtol=1e-6)


def test_generous_capacity_drops_nothing():
  args, dy = draw(k=3, load='one_hot_expert')
  got = parallel(MESHES['fsdp2_expert4'], 'padded', float(E))(args, dy)
  assert got[1] == 0
  assert_close(got, oracle(args, dy), 1e-5)


# ---- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('num_shards,k', [(2, 5), (4, 4), (8, 3)])
def test_each_token_visits_each_shard_once(num_shards, k):
  rng = np.random.default_rng(2)
  N = 11
  ids_Nk = np.stack([rng.permutation(E)[:k] for _ in range(N)])
  ids_Nk[rng.random(ids_Nk.shape) < .3] = E
  visits = moe_transport.plan_visits(jnp.asarray(ids_Nk), E, num_shards)
  wanted = [[t for t in range(N) if s in ids_Nk[t] // (E // num_shards)] for s in range(num_shards)]
  assert visits.size_n.tolist() == [len(tokens) for tokens in wanted]
  packed = sum(wanted, [])
  assert visits.token_Q.tolist() == packed + [N] * (N * min(k, num_shards) - len(packed))
  for t, v in np.ndindex(*visits.shard_Nv.shape):
    if (shard := int(visits.shard_Nv[t, v])) < num_shards:
      assert wanted[shard][int(visits.place_Nv[t, v])] == t


@pytest.mark.parametrize('transport', TRANSPORTS)
def test_empty_rows_cost_the_experts_nothing(transport):
  def count(x_ND, ids_Nk, weights_Nk, *matrices, most):
    return jnp.full(x_ND.shape, (ids_Nk < matrices[0].shape[0]).sum(), x_ND.dtype)

  def count_rows(x_QD, weight_Q1, group_sizes_E, *matrices):
    return jnp.full(x_QD.shape, group_sizes_E.sum(), x_QD.dtype)

  x, ids, weights, *matrices = draw(k=3, load='half_empty')[0]
  args = x, ids, jnp.ones_like(weights), *matrices
  y, _ = quick_jit(functools.partial(expert_parallel, mesh=build_mesh(expert=8), transport=transport,
                                     capacity_factor=0.0, experts=Experts(count, count_rows)))(*args)
  shard_BTk = np.asarray(args[1]) // (E // 8)
  work = np.bincount(shard_BTk.ravel(), minlength=8)
  assert work.all()
  visits_BTkn = shard_BTk[..., None] == np.arange(8)
  visited_BTn = visits_BTkn.sum(axis=2) if transport == 'direct' else visits_BTkn.any(axis=2) | (transport == 'ring')
  np.testing.assert_array_equal(y[..., 0], visited_BTn @ work)


def test_assignments_shrink_to_the_experts_of_a_shard():
  ids = jnp.array([[9, 3, 8, 0], [1, 2, 3, 4], [16, 16, 16, 16]], jnp.int32)
  ids_QE, weights_QE = moe_transport.localise(ids, jnp.arange(12, dtype=jnp.float32).reshape(3, 4), 8, 2)
  assert ids_QE.tolist() == [[0, 1], [2, 2], [2, 2]]
  assert weights_QE.tolist() == [[2, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize('transport', TRANSPORTS)
def test_tokens_move_by_gathers_in_both_directions(transport):
  args, dy = draw(k=3)
  text = str(parallel(MESHES['expert8'], transport, 0.8).trace(args, dy).jaxpr)
  assert not re.search(r':(f32|bf16)\[[\d,]*\] = scatter', text)


# ---- platforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_ragged_lowers_to_the_native_collective(platform):
  args, dy = draw(k=3)
  run = functools.partial(expert_parallel, mesh=build_mesh(fsdp=2, expert=4), transport='ragged', capacity_factor=0.0,
                          experts=DENSE, platform=platform)
  traced = jax.jit(functools.partial(value_and_grads, run)).trace(args, dy)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  # Forward: tokens, weights, ids there and results back; backward: the gradients of tokens, weights and results.
  assert text.count('@ragged_all_to_all') == 7
  assert text.count('"stablehlo.all_to_all"') == 1  # sizes and offsets, told once and kept for the way back


def test_emulated_ragged_all_to_all_follows_the_documented_loop():
  n, sent, received = 4, 9, 12
  rng = np.random.default_rng(3)
  size = np.array([[0, 3, 1, 2], [2, 0, 0, 4], [0, 0, 0, 0], [1, 2, 5, 1]])  # [source, destination]
  start = np.cumsum(size, axis=1) - size
  place = np.cumsum(size, axis=0) - size + 1
  operand = rng.normal(size=(n, sent, 2)).astype(np.float32)
  output = rng.normal(size=(n, received, 2)).astype(np.float32)
  want = output.copy()
  for source, destination in np.ndindex(n, n):
    rows, first, at = size[source, destination], start[source, destination], place[source, destination]
    want[destination, at:at + rows] = operand[source, first:first + rows]
  emulated = functools.partial(moe_transport.emulated_ragged_all_to_all, axis_name='i')
  mesh = jax.make_mesh((n,), ('i',), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
  got = jax.jit(jax.shard_map(lambda *shard: emulated(*(a[0] for a in shard))[None], mesh=mesh, in_specs=P('i'),
                              out_specs=P('i'), check_vma=False))(operand, output, start, size, place, size.T)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('mesh', [None, build_mesh()], ids=['no_mesh', 'mesh_of_one'])
def test_one_device_calls_the_experts_directly(mesh):
  args, _ = draw(k=3)
  run = functools.partial(expert_parallel, mesh=mesh, transport='ring', capacity_factor=0.0,
                          experts=DENSE)
  here = jax.jit(lambda *args: run(*args)[0]).lower(*args).as_text()
  assert here == jax.jit(lambda *args: single_device(*args)).lower(*args).as_text()


@pytest.mark.parametrize('shape,named', [((1, 1, 3, 1), 'moe.num_experts: 16'), ((1, 3, 1, 1), 'rows of the batch: 8'),
                                         ((1, 1, 1, 3), 'moe.d_ff: 4'), ((1, 1, 1, 1, 3), 'tokens of a row: 7')])
def test_indivisible_shapes_are_named(shape, named):
  args, _ = draw(k=3)
  if named.startswith('moe'):
    args = (*(jnp.concatenate([a, a[:1]]) for a in args[:3]), *args[3:])  # nine rows divide by three
  with pytest.raises(ConfigError, match=named):
    expert_parallel(*args, mesh=build_mesh(*shape), transport='ring', capacity_factor=0.0, experts=DENSE)
