"""MiniMax-Text-01 and MiniMax-M1: seven Lightning layers to one of full attention, post-norm, softmax router.

Two config formats name the same fields: the released one, which the models' own code reads, and that of transformers
(`minimax`). The released model rotates rotary_dim of each head; transformers' class rotates the whole head, whatever
its config says. Import follows rotary_dim where the file has it, so a released file gives the released model; export
names transformers' class only for a model that rotates the whole head.
"""

from operator import attrgetter
from typing import Any

from mmx.config import Layer, ModelConfig
from mmx.convert.family import Family, Fields, head_dim, pattern_of, read_common, write_common
from mmx.convert.mapping import ATTENTION, EXPERTS, FUSED_EXPERTS, Naming, layer_places

LIGHTNING = {
    # Each head's query, key and value lie beside each other.
    'self_attn.qkv_proj.weight': ('mixer/w_q mixer/w_k mixer/w_v', 's d h e -> (h s e) d'),
    'self_attn.output_gate.weight': ('mixer/w_gate', 'd h e -> (h e) d'),
    'self_attn.norm.weight': ('mixer/out_norm', 'n -> n'),
    'self_attn.out_proj.weight': ('mixer/w_o', 'h e d -> d (h e)'),
}
MIXERS = {'full': ATTENTION, 'lightning': LIGHTNING}

# Factors of the residual, by our field: released name, transformers' name.
FACTORS = {
    f'post_norm.{ours}_{factor}': (f'layernorm_{released}_{factor}', f'{theirs}_{factor}_factor')
    for ours, released, theirs in (
        ('attention', 'full_attention', 'full_attn'), ('lightning', 'linear_attention', 'linear_attn'),
        ('ffn', 'mlp', 'mlp'),
    )
    for factor in ('alpha', 'beta')
}


def read(fields: Fields) -> dict[str, Any]:
  """Overrides from config.json of either format."""
  fields.only(hidden_act='silu', shared_intermediate_size=0, postnorm=True, sliding_window=None)
  width = head_dim(fields)
  if 'attn_type_list' in fields:
    mixers = fields.per_layer('attn_type_list', {0: 'lightning', 1: 'full'})
  else:
    mixers = fields.per_layer('layer_types', {'linear_attention': 'lightning', 'full_attention': 'full'})
  return read_common(fields) | {
      'attention.rotary_dim': fields.get('rotary_dim', width),
      'lightning.num_heads': fields['num_attention_heads'],
      'lightning.head_dim': width,
      'moe.d_ff': fields['intermediate_size'],
      'moe.bias_update_rate': 0.0,  # these models have no expert biases
      'pattern': pattern_of(mixers, ['moe'] * len(mixers)),
  } | {ours: fields.get(released, fields.get(theirs, 1.0)) for ours, (released, theirs) in FACTORS.items()}


def write(model: ModelConfig) -> dict[str, Any]:
  """Fields of config.json: transformers' where its class computes this model, else the released format."""
  mixers = [layer.mixer for _, _, layer in layer_places(model.pattern)]
  whole = model.attention.rotary_dim == model.attention.head_dim
  factors = {names[whole]: attrgetter(ours)(model) for ours, names in FACTORS.items()}
  fields = write_common(model) | factors | {'intermediate_size': model.moe.d_ff}
  if whole:
    types = {'lightning': 'linear_attention', 'full': 'full_attention'}
    return fields | {
        'architectures': ['MiniMaxForCausalLM'], 'model_type': 'minimax',
        'layer_types': [types[mixer] for mixer in mixers], 'block_size': model.lightning.chunk,
    }
  return fields | {
      'architectures': ['MiniMaxText01ForCausalLM'], 'model_type': 'minimax_text_01', 'postnorm': True,
      'attn_type_list': [int(mixer == 'full') for mixer in mixers],
      'shared_intermediate_size': 0,
  }


FAMILY = Family(
    name='MiniMax-Text-01',
    architectures=('MiniMaxText01ForCausalLM', 'MiniMaxM1ForCausalLM', 'MiniMaxForCausalLM'),
    model_types=('minimax_text_01', 'minimax_m1', 'minimax'),
    namings=(
        Naming(mixers=MIXERS, ffns={'moe': EXPERTS}),
        Naming(mixers=MIXERS, ffns={'moe': FUSED_EXPERTS}),
    ),
    left_behind={
        r'\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$': 'decays, which follow from the config'
    },
    fixed={
        'norm': 'rms', 'residual': 'post_norm', 'activation': 'swiglu', 'key_shift': 'none',
        'attention.qk_norm': 'none', 'lightning.norm_eps': 1e-6, 'moe.gate': 'softmax', 'moe.routed_scaling': 1.0,
        'moe.shared_d_ff': 0,
    },
    layers=(Layer('lightning', 'moe'), Layer('full', 'moe')),
    read=read,
    write=write,
)
