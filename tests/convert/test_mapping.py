"""Names, shapes and places: each entry of ours has exactly one of theirs, under the names of the released files."""

import itertools

import numpy as np
import pytest

import folders

from mmx import config, flops
from mmx.convert import importer, m2, m3, mapping, text01
from mmx.convert.mapping import shortest_pattern, tensors
from mmx.convert.safetensors_io import Stored, scale_shape

NAMINGS = [(name, number) for name, family in folders.FAMILIES.items() for number in range(len(family.namings))]


def places(name, naming):
  """(tensors, {leaf: array of distinct numbers})."""
  model = folders.model(name)
  shapes = folders.shapes(model)
  numbers = itertools.count()
  count = lambda shape: np.array([next(numbers) for _ in range(int(np.prod(shape)))]).reshape(shape)
  leaves = {leaf: count(shape) for leaf, shape in shapes.items()}
  return list(tensors(model, folders.FAMILIES[name].namings[naming], shapes)), leaves


@pytest.mark.parametrize('name, naming', NAMINGS)
def test_every_entry_of_ours_is_in_exactly_one_of_theirs_and_comes_back(name, naming):
  chosen, leaves = places(name, naming)
  assert len({tensor.name for tensor in chosen}) == len(chosen)
  seen = {leaf: np.zeros(array.shape, int) for leaf, array in leaves.items()}
  for tensor in chosen:
    theirs = tensor.from_ours([leaves[leaf][tensor.at] for leaf in tensor.leaves])
    assert theirs.shape == tensor.shape and np.prod(tensor.piece()) * len(tensor.leaves) == theirs.size
    for leaf, part in zip(tensor.leaves, tensor.to_ours(theirs), strict=True):
      np.testing.assert_array_equal(part, leaves[leaf][tensor.at])
      seen[leaf][tensor.at] += 1
  for leaf, count in seen.items():
    nothing = name == 'text01' and leaf.startswith('router/')  # these models have no expert biases
    assert (count == (0 if nothing else 1)).all(), leaf


def theirs_of(name, naming):
  """({their name: array of our numbers}, {our leaf: the same numbers})."""
  chosen, leaves = places(name, naming)
  return {t.name: t.from_ours([leaves[leaf][t.at] for leaf in t.leaves]) for t in chosen}, leaves


def test_lightning_has_query_key_and_value_beside_each_other_in_each_head():
  theirs, ours = theirs_of('text01', 0)
  fused = theirs['model.layers.4.self_attn.qkv_proj.weight']  # the second of the second unit
  path = 'params/segment_0/layer_1/mixer/'
  H, Dh, D = 4, 6, 10
  for h, e, d in itertools.product(range(H), range(Dh), range(D)):
    for s, leaf in enumerate(('w_q', 'w_k', 'w_v')):
      assert fused[h * 3 * Dh + s * Dh + e, d] == ours[path + leaf][1, d, h, e]


@pytest.mark.parametrize('name, expert, shared', [
    ('m2', 'model.layers.1.block_sparse_moe.experts.2.', None),
    ('m3', 'language_model.model.layers.2.block_sparse_moe.experts.2.',
     'language_model.model.layers.2.block_sparse_moe.shared_experts.'),
])
def test_gate_is_w1_and_up_is_w3(name, expert, shared):
  theirs, ours = theirs_of(name, 0 if name == 'm2' else 1)
  path, row = ('params/segment_0/layer_0/ffn/', 1) if name == 'm2' else ('params/segment_1/layer_0/ffn/', 0)
  for d, f in itertools.product(range(10), range(8)):
    assert theirs[f'{expert}w1.weight'][f, d] == ours[f'{path}w_gate'][row, 2, d, f]
    assert theirs[f'{expert}w3.weight'][f, d] == ours[f'{path}w_up'][row, 2, d, f]
    assert theirs[f'{expert}w2.weight'][d, f] == ours[f'{path}w_down'][row, 2, f, d]
    if shared and f < 6:
      assert theirs[f'{shared}gate_proj.weight'][f, d] == ours[f'{path}shared/w_gate'][row, d, f]
      assert theirs[f'{shared}up_proj.weight'][f, d] == ours[f'{path}shared/w_up'][row, d, f]
      assert theirs[f'{shared}down_proj.weight'][d, f] == ours[f'{path}shared/w_down'][row, f, d]


@pytest.mark.parametrize('name, released, theirs', [('m2', 0, 1), ('text01', 0, 1), ('m3', 2, 0)])
def test_the_fused_matrices_of_transformers_are_gate_rows_then_up_rows(name, released, theirs):
  apart, fused = theirs_of(name, released)[0], theirs_of(name, theirs)[0]
  number, E = (2, 3)
  layer = f'model.layers.{number}.'
  experts = [f'{layer}block_sparse_moe.experts.{e}.' for e in range(E)]
  wanted = [np.concatenate([apart[f'{e}w1.weight'], apart[f'{e}w3.weight']]) for e in experts]
  np.testing.assert_array_equal(fused[f'{layer}mlp.experts.gate_up_proj'], np.stack(wanted))
  down = np.stack([apart[f'{e}w2.weight'] for e in experts])
  np.testing.assert_array_equal(fused[f'{layer}mlp.experts.down_proj'], down)
  if name == 'm3':
    for layer in ('model.layers.0.mlp', 'model.layers.2.mlp.shared_experts'):
      other = layer.replace('2.mlp', '2.block_sparse_moe')
      wanted = np.concatenate([apart[f'{other}.gate_proj.weight'], apart[f'{other}.up_proj.weight']])
      np.testing.assert_array_equal(fused[f'{layer}.gate_up_proj.weight'], wanted)


@pytest.mark.parametrize('pattern', [
    'full*62', 'full/dense*3 msa*57', '(lightning*7 full)*10', 'msa full', '(full lightning)*2 full',
    'lightning*3 full', 'full', '(full*2 msa/dense)*3 full*4',
])
def test_layers_give_back_the_shortest_pattern(pattern):
  layers = [layer for _, _, layer in mapping.layer_places(pattern)]
  assert shortest_pattern(layers) == pattern


# --- released checkpoints at their true size --------------------------------------------------------------------------


def released_m2():
  """{name: shape}, and which of them are float8, as the released index of M2 has them."""
  D, V = 3072, 200064
  names = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,), 'lm_head.weight': (V, D)}
  for layer in range(62):
    p = f'model.layers.{layer}.'
    names |= {p + 'input_layernorm.weight': (D,), p + 'post_attention_layernorm.weight': (D,)}
    names |= {p + 'self_attn.q_proj.weight': (6144, D), p + 'self_attn.o_proj.weight': (D, 6144)}
    names |= {p + 'self_attn.k_proj.weight': (1024, D), p + 'self_attn.v_proj.weight': (1024, D)}
    names |= {p + 'self_attn.q_norm.weight': (6144,), p + 'self_attn.k_norm.weight': (1024,)}
    names |= {p + 'block_sparse_moe.gate.weight': (256, D), p + 'block_sparse_moe.e_score_correction_bias': (256,)}
    for e in range(256):
      q = f'{p}block_sparse_moe.experts.{e}.'
      names |= {q + 'w1.weight': (1536, D), q + 'w3.weight': (1536, D), q + 'w2.weight': (D, 1536)}
  return names


def released_text01():
  D, V = 6144, 200064
  names = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,), 'lm_head.weight': (V, D)}
  for layer in range(80):
    p = f'model.layers.{layer}.'
    names |= {p + 'input_layernorm.weight': (D,), p + 'post_attention_layernorm.weight': (D,)}
    if layer % 8 == 7:
      names |= {p + 'self_attn.q_proj.weight': (8192, D), p + 'self_attn.o_proj.weight': (D, 8192)}
      names |= {p + 'self_attn.k_proj.weight': (1024, D), p + 'self_attn.v_proj.weight': (1024, D)}
    else:
      names |= {p + 'self_attn.qkv_proj.weight': (3 * 8192, D), p + 'self_attn.output_gate.weight': (8192, D)}
      names |= {p + 'self_attn.norm.weight': (8192,), p + 'self_attn.out_proj.weight': (D, 8192)}
    names |= {p + 'block_sparse_moe.gate.weight': (32, D)}
    for e in range(32):
      q = f'{p}block_sparse_moe.experts.{e}.'
      names |= {q + 'w1.weight': (9216, D), q + 'w3.weight': (9216, D), q + 'w2.weight': (D, 9216)}
  return names


def released_m3():
  D, V = 6144, 200064
  m = 'language_model.model.'
  names = {m + 'embed_tokens.weight': (V, D), m + 'norm.weight': (D,), 'language_model.lm_head.weight': (V, D)}
  for layer in range(60):
    p = f'{m}layers.{layer}.'
    names |= {p + 'input_layernorm.weight': (D,), p + 'post_attention_layernorm.weight': (D,)}
    names |= {p + 'self_attn.q_proj.weight': (8192, D), p + 'self_attn.o_proj.weight': (D, 8192)}
    names |= {p + 'self_attn.k_proj.weight': (512, D), p + 'self_attn.v_proj.weight': (512, D)}
    names |= {p + 'self_attn.q_norm.weight': (128,), p + 'self_attn.k_norm.weight': (128,)}
    if layer < 3:
      names |= {p + 'mlp.gate_proj.weight': (12288, D), p + 'mlp.up_proj.weight': (12288, D)}
      names |= {p + 'mlp.down_proj.weight': (D, 12288)}
      continue
    names |= {p + 'self_attn.index_q_proj.weight': (512, D), p + 'self_attn.index_k_proj.weight': (128, D)}
    names |= {p + 'self_attn.index_q_norm.weight': (128,), p + 'self_attn.index_k_norm.weight': (128,)}
    names |= {p + 'block_sparse_moe.gate.weight': (128, D), p + 'block_sparse_moe.e_score_correction_bias': (128,)}
    s = p + 'block_sparse_moe.shared_experts.'
    names |= {s + 'gate_proj.weight': (3072, D), s + 'up_proj.weight': (3072, D), s + 'down_proj.weight': (D, 3072)}
    for e in range(128):
      q = f'{p}block_sparse_moe.experts.{e}.'
      names |= {q + 'w1.weight': (3072, D), q + 'w3.weight': (3072, D), q + 'w2.weight': (D, 3072)}
  return names


RELEASED = {
    'm2_230b': (released_m2, m2.RELEASED, 228_689_764_864, 62 * 256),
    'text01_456b': (released_text01, text01.FAMILY.namings[0], 456_089_655_296, 0),
    'm3_428b': (released_m3, m3.RELEASED, 426_174_565_632, 7_296),
}


@pytest.mark.parametrize('file', RELEASED)
def test_the_published_configs_have_the_released_names_and_shapes(file):
  listing, naming, parameters, biases = RELEASED[file]
  model = config.load(f'configs/models/{file}.gin').model
  found = {tensor.name: tensor.shape for tensor in tensors(model, naming, folders.shapes(model))}
  assert found == listing()
  total = sum(int(np.prod(shape, dtype=np.int64)) for shape in found.values())
  # The sheet's figure of M2 counts the biases, that of M3 gives them apart.
  assert total == parameters + (biases if file == 'm3_428b' else 0)
  count = flops.count_parameters(model)
  assert count.total == total - biases


def test_the_released_files_of_m2_are_accepted_with_exactly_their_scales():
  """Headers as the files have them, float8 but for embedding, head, norms, gates and biases."""
  names = released_m2()
  matrices = [name for name, shape in names.items() if len(shape) == 2 and name.startswith('model.layers')]
  quantised = [name for name in matrices if not name.endswith('gate.weight')]
  assert scale_shape((6144, 3072)) == (48, 24) and scale_shape((1024, 3072)) == (8, 24)
  scales = {f'{name}_scale_inv': scale_shape(names[name]) for name in quantised}
  count = lambda shapes: sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
  assert count(scales) == 13_880_064 and count(names) + count(scales) == 228_703_644_928

  stored = {name: Stored('', 'BF16', shape, 0) for name, shape in names.items()}
  stored |= {name: Stored('', 'F8_E4M3', names[name], 0) for name in quantised}
  headers = stored | {name: Stored('', 'F32', shape, 0) for name, shape in scales.items()}
  model = config.load('configs/models/m2_230b.gin').model
  plan = importer.compare('M2', m2.FAMILY, model, headers)
  assert len(plan.tensors()) == len(names) and not plan.skipped
  lost = 'model.layers.61.block_sparse_moe.experts.255.w2.weight'
  del headers[f'{lost}_scale_inv']
  with pytest.raises(config.ConfigError, match=f'1 F8_E4M3 without _scale_inv: {lost}$'):
    importer.compare('M2', m2.FAMILY, model, headers)
