"""Rows split over shards of the axis 'context' against one device: each mixer, and what travels between its shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from one_mixer import close, packed, randomised

from mmx import sharding
from mmx.config import ConfigError, MeshConfig
from mmx.kernels_pallas import attention, reference, sliding
from mmx.kernels_pallas.chunks import Part
from mmx.layers import context_parallel
from mmx.layers.mixer import MIXERS
from mmx.model import Decoder, init_cache

LENGTH = 48  # 12 tokens a shard of 4: windows reach over one and into the next, blocks of 5 over the edges
SMALL = {
    'model__sliding__window': 17, 'model__lightning__num_heads': 4, 'model__lightning__head_dim': 8,
    'model__lightning__chunk': 8, 'model__msa__block_size': 5, 'model__msa__top_k': 3, 'model__msa__index_dim': 8,
    'model__key_shift': 'learned',  # what precedes a shard's first token is another's last
}  # fmt: skip


def mesh_of(shards):
  return sharding.build_mesh(MeshConfig(fsdp=1, context=shards, num_devices=shards))


def rows(*documents, length=LENGTH):
  """Packed rows, each with documents of these lengths, padding behind."""
  contexts = [packed(*lengths, padding=length - sum(lengths)) for lengths in documents]
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *contexts).replace(warmup=jnp.bool_(False))


ROWS = {
    'one document': rows((LENGTH,), (LENGTH,)),
    'ends on the edges': rows((12, 24, 12), (6, 6, 36)),
    'ends within shards': rows((5, 1, 25, 17), (13, 30, 5)),
    'shards of padding': rows((5, 4), (23,)),
}


class Case:
  """A mixer and its parameters; `results(shards)` is compiled once for all packings."""

  def __init__(self, name, overrides=(), length=LENGTH):
    self.model, self.name = tiny.experiment(**SMALL | dict(overrides)).model, name
    self.x_BTD = jax.random.normal(jax.random.key(0), (2, length, self.model.d_model))
    context = rows((length,), (length,), length=length)
    self.tree = randomised(self._layer(1).init(jax.random.key(1), self.x_BTD, context, 0, None), seed=2)

  def _layer(self, shards):
    return MIXERS[self.name].layer(self.model, 1.0, None if shards == 1 else mesh_of(shards))

  @functools.cache
  def results(self, shards):
    """f(context) -> gradients by all parameters and the input, of a loss that weighs each output, y, and aux."""
    mixer = self._layer(shards)

    def loss(tree, x_BTD, context):
      y_BTD, _, aux = mixer.apply(tree, x_BTD, context, jnp.int32(1), None)
      total = jnp.sum(y_BTD * jnp.cos(jnp.arange(y_BTD.size, dtype=jnp.float32).reshape(y_BTD.shape)))
      return total + (0 if aux is None else 10 * aux.kl), (y_BTD, aux)

    compiled = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    return lambda context: compiled(self.tree, self.x_BTD, context)


@functools.cache
def case(name, *overrides, length=LENGTH):
  return Case(name, overrides, length)


@pytest.mark.parametrize('documents', [
    pytest.param(name, marks=pytest.mark.slow if name == 'one document' else ()) for name in ROWS
])
@pytest.mark.parametrize('name', MIXERS)
def test_shards_of_a_row_equal_one_device_in_values_and_gradients(name, documents):
  both = case(name)
  jax.tree.map(close, both.results(4)(ROWS[documents]), both.results(1)(ROWS[documents]))


@pytest.mark.parametrize('name, length, shards, overrides', [
    pytest.param('full', 33, 3, {}, id='odd shards, which swap nothing'),
    pytest.param('full', 600, 4, {}, id='spans that reach back', marks=pytest.mark.slow),
    pytest.param('sliding', LENGTH, 4, {'model__sliding__sink_tokens': 3}, id='sinks'),
    pytest.param('sliding', 128, 4, {'model__sliding__window': 66}, id='a window over shards and chunks'),
    pytest.param('lightning', LENGTH, 8, {}, id='shards shorter than a chunk'),
])  # fmt: skip
def test_other_lengths_windows_and_sinks_equal_one_device_too(name, length, shards, overrides):
  both, third = case(name, *overrides.items(), length=length), length // 3
  context = rows((third, length - third), (1, third, third + 1), length=length)
  jax.tree.map(close, both.results(shards)(context), both.results(1)(context))


def test_the_warm_up_of_an_index_branch_sees_whole_rows():
  both = case('msa')
  context = ROWS['ends within shards'].replace(warmup=jnp.bool_(True))
  jax.tree.map(close, both.results(4)(context), both.results(1)(context))


def test_the_tpu_kernel_of_each_part_equals_the_oracle():
  """In interpret mode, values and gradients; the tables of its blocks are cut for every part alike."""
  shards, T, heads, kv_heads, Dh = 2, 256, 2, 1, 128
  random = lambda seed, heads: jax.random.normal(jax.random.key(seed), (1, shards * T, heads, Dh))
  q, k, v, weights = random(0, heads), random(1, kv_heads), random(2, kv_heads), random(3, heads)
  segments = rows((100, 412), length=shards * T).segment_ids_BT
  slots_nT = context_parallel.swapped_slots(shards, T)

  def of_parts(q, k, v):
    outs = []
    for index, slots_T in enumerate(slots_nT):
      part = Part(slots_nT, jnp.int32(index), segments)
      outs.append(attention.attention_splash(q[:, slots_T], k, v, segments[:, slots_T], part=part, interpret=True))
    return jnp.concatenate(outs, axis=1)[:, np.argsort(slots_nT.reshape(-1))]

  run = lambda function: jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(function(*qkv) * weights), (0, 1, 2)))(q, k, v)
  found, wanted = run(of_parts), run(lambda *qkv: reference.attention(*qkv, segments))
  jax.tree.map(functools.partial(close, tolerance=1e-4), found, wanted)


@pytest.mark.parametrize('axes', [{'context': 4}, {'context': 2, 'fsdp': 2, 'tensor': 2}, {'fsdp': 2, 'tensor': 2}])
def test_the_tpu_kernel_of_a_window_equals_the_oracle_on_any_mesh(axes, monkeypatch):
  """In interpret mode, values and gradients; a window of 65 tokens reaches over a shard of 52 and into the next."""
  monkeypatch.setattr(sliding, 'sliding_splash', functools.partial(sliding.sliding_splash, interpret=True))
  mesh = sharding.build_mesh(MeshConfig(**{'fsdp': 1} | axes, num_devices=int(np.prod(list(axes.values())))))
  random = lambda seed, heads: jax.random.normal(jax.random.key(seed), (2, 208, heads, 128))
  qkv, weights = (random(0, 4), random(1, 2), random(2, 2)), random(3, 4)
  context = rows((70, 120), (208,), length=208)
  where = context.segment_ids_BT, context.positions_BT
  choice = {'sink_tokens': 0, 'implementation': 'auto', 'platform': 'tpu', 'mesh': mesh}
  run = lambda function: jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(function(*qkv) * weights), (0, 1, 2)))(*qkv)
  function = lambda *qkv: context_parallel.slide(*qkv, *where, window=65, **choice)
  assert 'shard_map' in (text := str(jax.make_jaxpr(function)(*qkv))) and 'pallas_call' in text
  wanted = run(lambda *qkv: reference.sliding(*qkv, *where, 65))
  jax.tree.map(functools.partial(close, tolerance=1e-4), run(function), wanted)


# ----------------------------------------------------------------------------------------------------------------------
# what travels


@pytest.mark.parametrize('shards', [2, 3, 4, 5, 8])
def test_swapped_slices_share_the_keys_evenly_and_come_back(shards):
  T = 6
  slots_nT = context_parallel.swapped_slots(shards, T)
  np.testing.assert_array_equal(np.sort(slots_nT.reshape(-1)), np.arange(shards * T))
  seen_n = (slots_nT + 1).sum(axis=1)
  assert len(set(seen_n)) == 1, 'keys that the queries of each shard see'

  def there_and_back(x_BT):
    swapped_BT = context_parallel.swap(x_BT, shards)
    return swapped_BT, context_parallel.swap(swapped_BT, shards, back=True)

  spec = P(None, 'context')
  run = jax.shard_map(there_and_back, mesh=mesh_of(shards), in_specs=spec, out_specs=spec, check_vma=False)
  row_BT = jnp.arange(shards * T)[None]
  swapped, back = jax.jit(run)(row_BT)
  np.testing.assert_array_equal(swapped[0], slots_nT.reshape(-1))
  np.testing.assert_array_equal(back, row_BT)


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize('shift, moved', [(context_parallel.one_before, 1), (context_parallel.one_after, -1)])
def test_tokens_move_by_one_over_the_edges_of_shards(shift, moved):
  x_BTD = jnp.arange(2.0 * 12 * 3).reshape(2, 12, 3) + 1
  wanted = jnp.roll(x_BTD, moved, axis=1).at[:, 0 if moved > 0 else -1].set(0)
  for shards in (1, 4):
    mesh = mesh_of(shards)
    found, back = jax.jit(functools.partial(jax.vjp, lambda x: shift(x, mesh)))(x_BTD)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(back(x_BTD)[0], jax.vjp(lambda x: shift(x, None), x_BTD)[1](x_BTD)[0])


def test_rows_that_do_not_divide_and_caches_are_refused_in_one_line():
  model, tokens_BT = tiny.BASE.model, jnp.zeros((1, 6), jnp.int32)
  decoder = Decoder(model, mesh_of(4))
  with pytest.raises(ConfigError, match=r'^a row of 6 tokens \(data.seq_len\) does not divide by mesh.context = 4'):
    decoder.init(jax.random.key(0), tokens_BT, tokens_BT, tokens_BT)
  with pytest.raises(ConfigError, match='^mesh.context = 4: generation holds whole sequences; set mesh.context = 1'):
    decoder.init(jax.random.key(0), tokens_BT[:, :4], tokens_BT[:, :4], tokens_BT[:, :4], init_cache(model, 1, 8))


@pytest.mark.parametrize('name', ['full', 'sliding', 'msa'])
def test_an_implementation_that_serves_whole_rows_only_says_so(name):
  field = {'full': 'attention'}.get(name, name)
  with pytest.raises(ValueError, match="implementation 'reference' cannot be used here: serves whole rows only"):
    case(name, (f'model__{field}__implementation', 'reference')).results(4)(ROWS['one document'])
