"""MiniMax-M3's text model: sparse attention above three dense layers, Gemma norms, SwiGLU-OAI, a shared expert.

Released files hold the vision tower as well, which is left behind; export writes the text model alone, as transformers
does (`minimax_m3_vl_text`).
"""

from typing import Any

from mmx.config import ConfigError, Layer, ModelConfig
from mmx.convert.family import Family, Fields, head_dim, pattern_of, read_common, write_common
from mmx.convert.mapping import ATTENTION, EXPERT_BIAS, EXPERTS, FUSED_EXPERTS, Naming, layer_places

ALPHA, LIMIT = 1.702, 7.0  # of activation 'swiglu_oai'


def _index(query, key):
  """Rules of the index branch; `query` and `key` are its names before '_proj' and '_norm'."""
  return {
      f'self_attn.{query}_proj.weight': ('mixer/w_index_q', 'd k e -> (k e) d'),
      f'self_attn.{key}_proj.weight': ('mixer/w_index_k', 'd e -> e d'),
      f'self_attn.{query}_norm.weight': ('mixer/index_q_norm', 'e -> e'),
      f'self_attn.{key}_norm.weight': ('mixer/index_k_norm', 'e -> e'),
  }


def _mlp(prefix, leaf):
  """Rules of a dense feed-forward with gate and up apart."""
  return {
      f'{prefix}.gate_proj.weight': (f'{leaf}/w_gate', 'd f -> f d'),
      f'{prefix}.up_proj.weight': (f'{leaf}/w_up', 'd f -> f d'),
      f'{prefix}.down_proj.weight': (f'{leaf}/w_down', 'f d -> d f'),
  }


def _fused_mlp(prefix, leaf):
  """The same with gate rows first in one matrix."""
  return {
      f'{prefix}.gate_up_proj.weight': (f'{leaf}/w_gate {leaf}/w_up', 's d f -> (s f) d'),
      f'{prefix}.down_proj.weight': (f'{leaf}/w_down', 'f d -> d f'),
  }


TRANSFORMERS = Naming(
    mixers={'full': ATTENTION, 'msa': ATTENTION | _index('indexer.q', 'indexer.k')},
    ffns={
        'dense': _fused_mlp('mlp', 'ffn'),
        'moe': FUSED_EXPERTS | _fused_mlp('mlp.shared_experts', 'ffn/shared')
        | {'mlp.gate.e_score_correction_bias': ('ffn/bias', 'e -> e')},
    },
)
_RELEASED = {
    'mixers': {'full': ATTENTION, 'msa': ATTENTION | _index('index_q', 'index_k')},
    'ffns': {
        'dense': _mlp('mlp', 'ffn'),
        'moe': EXPERTS | EXPERT_BIAS | _mlp('block_sparse_moe.shared_experts', 'ffn/shared'),
    },
}
RELEASED = Naming(prefix='language_model.model.', head='language_model.lm_head.weight', **_RELEASED)
TEXT_ONLY = Naming(**_RELEASED)


def read(fields: Fields) -> dict[str, Any]:
  """Overrides from config.json, of the text model or of the whole with a text_config."""
  text = fields
  if 'text_config' in fields:
    dtypes = {name: fields.values[name] for name in ('dtype', 'torch_dtype') if name in fields}
    text = Fields(dtypes | fields.group('text_config').values, f'{fields.where}: text_config')
  text.only(
      scoring_func='sigmoid', use_routing_bias=True, use_gemma_norm=True, use_qk_norm=True, qk_norm_type='per_head',
      swiglu_alpha=ALPHA, swiglu_limit=LIMIT, attention_output_gate=False, n_shared_experts=1,
  )
  if text.get('hidden_act', 'silu') not in ('silu', 'swigluoai'):  # transformers writes silu and computes swigluoai
    raise ConfigError(f"{text.where}: hidden_act = {text['hidden_act']!r}: only 'swigluoai' is implemented")
  count = text.number('num_hidden_layers')
  sparse = Fields(text.group('sparse_attention_config').values | {'num_hidden_layers': count}, text.where)
  sparse.only(sparse_score_type='max', sparse_init_block=0, sparse_local_block=1)
  text.only(index_local_blocks=1)

  mixers = ['full'] * count
  if 'layer_types' in text:
    mixers = text.per_layer('layer_types', {'full_attention': 'full', 'minimax_m3_sparse': 'msa'})
  elif 'sparse_attention_freq' in sparse and sparse.get('use_sparse_attention', True):
    mixers = sparse.per_layer('sparse_attention_freq', {0: 'full', 1: 'msa'})
  ffns = ['moe'] * count
  if 'mlp_layer_types' in text:
    ffns = text.per_layer('mlp_layer_types', {'sparse': 'moe', 'dense': 'dense'})
  elif 'moe_layer_freq' in text:
    ffns = text.per_layer('moe_layer_freq', {0: 'dense', 1: 'moe'})
  if 'sparse_disable_index_value' in sparse:
    flags = sparse.per_layer('sparse_disable_index_value', {0: 'value', 1: 'none'})
    if bad := [i for i, (mixer, flag) in enumerate(zip(mixers, flags)) if mixer == 'msa' and flag == 'value']:
      raise ConfigError(f'{text.where}: sparse_disable_index_value: layer {bad[0]} has an index value: not implemented')

  def index_field(released, theirs, default):
    """Of the index branch, under either name."""
    if 'msa' not in mixers:
      return default
    return sparse[released] if released in sparse else text[theirs]

  defaults, heads = ModelConfig().msa, text['num_key_value_heads']
  if (found := index_field('sparse_num_index_heads', 'index_n_heads', heads)) != heads:
    only = f'only one for each of the {heads} key-value heads is implemented'
    raise ConfigError(f'{text.where}: {found} index heads: {only}')
  rope, width = text.group('rope_parameters'), head_dim(text)
  if rope.values:  # transformers writes rotary_dim, but reads the factor alone
    rotary_dim = round(rope.number('partial_rotary_factor', 1.0) * width)
  elif 'partial_rotary_factor' in text:
    rotary_dim = round(text.number('partial_rotary_factor') * width)
  else:
    rotary_dim = text.get('rotary_dim', width)
  return read_common(text) | {
      'attention.rotary_dim': rotary_dim,
      'msa.block_size': index_field('sparse_block_size', 'index_block_size', defaults.block_size),
      'msa.top_k': index_field('sparse_topk_blocks', 'index_topk_blocks', defaults.top_k),
      'msa.index_dim': index_field('sparse_index_dim', 'index_head_dim', defaults.index_dim),
      'd_ff': text.get('dense_intermediate_size', ModelConfig().d_ff) if 'dense' in ffns else ModelConfig().d_ff,
      'moe.d_ff': text['intermediate_size'],
      'moe.shared_d_ff': text['shared_intermediate_size'],
      'moe.routed_scaling': text.get('routed_scaling_factor', 1.0),
      'pattern': pattern_of(mixers, ffns),
  }


def write(model: ModelConfig) -> dict[str, Any]:
  """Fields of transformers' config of the text model."""
  layers = [layer for _, _, layer in layer_places(model.pattern)]
  return write_common(model) | {
      'architectures': ['MiniMaxM3VLForCausalLM'], 'model_type': 'minimax_m3_vl_text',
      'layer_types': [{'full': 'full_attention', 'msa': 'minimax_m3_sparse'}[layer.mixer] for layer in layers],
      'mlp_layer_types': [{'moe': 'sparse', 'dense': 'dense'}[layer.ffn] for layer in layers],
      'index_n_heads': model.attention.num_kv_heads, 'index_head_dim': model.msa.index_dim,
      'index_block_size': model.msa.block_size, 'index_topk_blocks': model.msa.top_k, 'index_local_blocks': 1,
      'intermediate_size': model.moe.d_ff, 'dense_intermediate_size': model.d_ff,
      'shared_intermediate_size': model.moe.shared_d_ff, 'routed_scaling_factor': model.moe.routed_scaling,
      'swiglu_alpha': ALPHA, 'swiglu_limit': LIMIT,
  }


FAMILY = Family(
    name='MiniMax-M3',
    architectures=('MiniMaxM3SparseForConditionalGeneration', 'MiniMaxM3SparseForCausalLM', 'MiniMaxM3VLForCausalLM'),
    model_types=('minimax_m3_vl', 'minimax_m3_vl_text'),
    namings=(TRANSFORMERS, RELEASED, TEXT_ONLY),
    left_behind={
        r'^(model\.)?(vision_tower|multi_modal_projector|patch_merge_mlp)\.': 'vision',
        r'^(language_model\.)?model\.mtp\.': 'multi-token prediction',
    },
    fixed={
        'norm': 'gemma', 'residual': 'pre_norm', 'activation': 'swiglu_oai', 'key_shift': 'none',
        'attention.qk_norm': 'per_head', 'msa.index_norm': 'per_head', 'moe.gate': 'sigmoid',
    },
    layers=tuple(Layer(mixer, ffn) for mixer in ('full', 'msa') for ffn in ('moe', 'dense')),
    read=read,
    write=write,
)
