"""MiniMax-M2, M2.1, M2.5 and M2.7: full attention everywhere, one norm over all heads, sigmoid router with a bias."""

from typing import Any

from mmx.config import Layer, ModelConfig, num_layers
from mmx.convert.family import Family, Fields, head_dim, pattern_of, read_common, write_common
from mmx.convert.mapping import ATTENTION, EXPERT_BIAS, EXPERTS, FUSED_EXPERTS, Naming

RELEASED = Naming(mixers={'full': ATTENTION}, ffns={'moe': EXPERTS | EXPERT_BIAS})
TRANSFORMERS = Naming(
    mixers={'full': ATTENTION},
    ffns={'moe': FUSED_EXPERTS | {'mlp.e_score_correction_bias': ('ffn/bias', 'e -> e')}},
)


def read(fields: Fields) -> dict[str, Any]:
  """Overrides from config.json.

  A bare config of transformers rotates the whole head, and so does a file that says nothing of it here. What released
  files say of MTP is passed over: none holds its weights.
  """
  fields.only(
      hidden_act='silu', scoring_func='sigmoid', use_routing_bias=True, use_qk_norm=True, qk_norm_type='per_layer',
      shared_intermediate_size=0, routed_scaling_factor=1.0,
  )
  if 'attn_type_list' in fields:
    fields.per_layer('attn_type_list', {1: 'full'})
  rope, width, count = fields.group('rope_parameters'), head_dim(fields), fields.number('num_hidden_layers')
  if 'partial_rotary_factor' in rope or 'partial_rotary_factor' in fields:
    given = rope if 'partial_rotary_factor' in rope else fields
    rotary_dim = round(given.number('partial_rotary_factor') * width)
  else:
    rotary_dim = fields.get('rotary_dim', width)
  return read_common(fields) | {
      'attention.rotary_dim': rotary_dim,
      'moe.d_ff': fields['intermediate_size'],
      'pattern': pattern_of(['full'] * count, ['moe'] * count),
  }


def write(model: ModelConfig) -> dict[str, Any]:
  """Fields of config.json."""
  return write_common(model) | {
      'architectures': ['MiniMaxM2ForCausalLM'], 'model_type': 'minimax_m2', 'intermediate_size': model.moe.d_ff,
      'scoring_func': 'sigmoid', 'use_routing_bias': True, 'use_qk_norm': True, 'qk_norm_type': 'per_layer',
      'attn_type_list': [1] * num_layers(model.pattern),
  }


FAMILY = Family(
    name='MiniMax-M2',
    architectures=('MiniMaxM2ForCausalLM',),
    model_types=('minimax_m2',),
    namings=(RELEASED, TRANSFORMERS),
    left_behind={},
    fixed={
        'norm': 'rms', 'residual': 'pre_norm', 'activation': 'swiglu', 'key_shift': 'none',
        'attention.qk_norm': 'full_width', 'moe.gate': 'sigmoid', 'moe.routed_scaling': 1.0, 'moe.shared_d_ff': 0,
    },
    layers=(Layer('full', 'moe'),),
    read=read,
    write=write,
)
