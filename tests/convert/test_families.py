"""config.json: the released files give the published configs, what we write reads back, what we lack is said."""

import json

import pytest

import folders

from mmx import config
from mmx.config import ConfigError
from mmx.convert import families

# Fields as the released files have them, those that decide nothing here left out.
M2 = {
    'architectures': ['MiniMaxM2ForCausalLM'], 'model_type': 'minimax_m2', 'attn_type_list': [1] * 62,
    'head_dim': 128, 'hidden_act': 'silu', 'hidden_size': 3072, 'intermediate_size': 1536,
    'max_position_embeddings': 196608, 'num_attention_heads': 48, 'num_experts_per_tok': 8, 'num_hidden_layers': 62,
    'num_key_value_heads': 8, 'num_local_experts': 256, 'num_mtp_modules': 3, 'mtp_transformer_layers': 1,
    'use_mtp': True, 'qk_norm_type': 'per_layer', 'rms_norm_eps': 1e-6, 'rope_theta': 5000000, 'rotary_dim': 64,
    'scoring_func': 'sigmoid', 'shared_intermediate_size': 0, 'tie_word_embeddings': False, 'use_qk_norm': True,
    'use_routing_bias': True, 'vocab_size': 200064, 'dtype': 'bfloat16',
    'quantization_config': {'quant_method': 'fp8', 'fmt': 'float8_e4m3fn', 'weight_block_size': [128, 128]},
}
TEXT01 = {
    'architectures': ['MiniMaxText01ForCausalLM'], 'model_type': 'minimax_text_01',
    'attn_type_list': ([0] * 7 + [1]) * 10, 'head_dim': 128, 'hidden_act': 'silu', 'hidden_size': 6144,
    'intermediate_size': 9216, 'layernorm_full_attention_alpha': 3.5565588200778455,
    'layernorm_full_attention_beta': 1.0, 'layernorm_linear_attention_alpha': 3.5565588200778455,
    'layernorm_linear_attention_beta': 1.0, 'layernorm_mlp_alpha': 3.5565588200778455, 'layernorm_mlp_beta': 1.0,
    'num_attention_heads': 64, 'num_experts_per_tok': 2, 'num_hidden_layers': 80, 'num_key_value_heads': 8,
    'num_local_experts': 32, 'postnorm': True, 'rms_norm_eps': 1e-5, 'rope_theta': 10000000, 'rotary_dim': 64,
    'shared_intermediate_size': 0, 'shared_moe_mode': 'sigmoid', 'sliding_window': None,
    'tie_word_embeddings': False, 'vocab_size': 200064, 'torch_dtype': 'bfloat16',
}
M1 = TEXT01 | {'architectures': ['MiniMaxM1ForCausalLM'], 'model_type': 'minimax_m1'}
M3 = {
    'architectures': ['MiniMaxM3SparseForConditionalGeneration'], 'model_type': 'minimax_m3_vl',
    'dtype': 'bfloat16', 'projector_hidden_size': 6144, 'vision_config': {'hidden_size': 1280},
    'text_config': {
        'architectures': ['MiniMaxM3SparseForCausalLM'], 'hidden_size': 6144, 'intermediate_size': 3072,
        'dense_intermediate_size': 12288, 'shared_intermediate_size': 3072, 'n_shared_experts': 1,
        'num_hidden_layers': 60, 'num_attention_heads': 64, 'num_key_value_heads': 4, 'head_dim': 128,
        'hidden_act': 'swigluoai', 'swiglu_alpha': 1.702, 'swiglu_limit': 7.0, 'rms_norm_eps': 1e-6,
        'use_gemma_norm': True, 'use_qk_norm': True, 'qk_norm_type': 'per_head', 'rope_theta': 5000000,
        'rotary_dim': 64, 'partial_rotary_factor': 0.5, 'vocab_size': 200064, 'tie_word_embeddings': False,
        'num_local_experts': 128, 'num_experts_per_tok': 4, 'scoring_func': 'sigmoid', 'use_routing_bias': True,
        'routed_scaling_factor': 2.0, 'moe_layer_freq': [0] * 3 + [1] * 57, 'num_mtp_modules': 7,
        'attention_output_gate': False,
        'sparse_attention_config': {
            'use_sparse_attention': True, 'sparse_index_dim': 128, 'sparse_num_index_heads': 4,
            'sparse_topk_blocks': 16, 'sparse_block_size': 128, 'sparse_score_type': 'max', 'sparse_init_block': 0,
            'sparse_local_block': 1, 'sparse_attention_freq': [0] * 3 + [1] * 57,
            'sparse_disable_index_value': [0] * 3 + [1] * 57,
        },
    },
}
RELEASED = {'m2_230b': M2, 'text01_456b': TEXT01, 'm3_428b': M3}
OURS_TO_CHOOSE = ('model.remat', 'model.moe.balance_loss_weight', 'model.lightning.chunk')


def read(folder, fields):
  folders.write_config(folder, fields)
  return families.read_config(folder)


@pytest.mark.parametrize('file, fields', [*RELEASED.items(), ('text01_456b', M1)])
def test_released_files_give_the_published_configs(file, fields, tmp_path):
  _, overrides = read(tmp_path, fields)
  found = config.override(config.Experiment(), overrides)
  wanted = config.load(f'configs/models/{file}.gin')
  different = [item for item in config.diff(found, wanted) if item[0].startswith('model.')]
  assert not [item for item in different if item[0] not in OURS_TO_CHOOSE]


@pytest.mark.parametrize('name', folders.FAMILIES)
def test_what_we_write_reads_back(name, tmp_path):
  for overrides in ({}, {'tie_embeddings': True}, {'attention__rotary_dim': 2}):
    model = folders.model(name, **overrides)
    family, found = read(tmp_path, families.of_model(model).write(model))
    assert family is folders.FAMILIES[name]
    back = config.override(config.Experiment(model=model), found).model
    if name == 'text01' and overrides:  # the released format has no chunk, and transformers' rotates everything
      back = config.override(config.Experiment(model=back), {'model.lightning.chunk': model.lightning.chunk}).model
    assert back == model


@pytest.mark.parametrize('fields, rotary_dim', [
    ({}, 8),  # what a bare config of transformers does
    ({'rotary_dim': 4}, 4),
    ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e6}}, 8),
    ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e6, 'partial_rotary_factor': 0.25}}, 2),
    ({'rotary_dim': 4, 'rope_parameters': {'rope_theta': 5e6, 'partial_rotary_factor': 0.5}}, 4),
])
def test_as_much_of_a_head_rotates_as_the_file_says(fields, rotary_dim, tmp_path):
  small = {'head_dim': 8, 'num_attention_heads': 4, 'num_key_value_heads': 2}
  without = {name: value for name, value in M2.items() if name != 'rotary_dim'}
  assert read(tmp_path, without | small | fields)[1]['model.attention.rotary_dim'] == rotary_dim
  if 'rotary_dim' in fields:  # Text-01: what the released models do, though transformers' class does not
    assert read(tmp_path, TEXT01 | small | fields)[1]['model.attention.rotary_dim'] == rotary_dim
  text = {k: v for k, v in M3['text_config'].items() if k not in ('rotary_dim', 'partial_rotary_factor')}
  text |= small | {'sparse_attention_config': text['sparse_attention_config'] | {'sparse_num_index_heads': 2}}
  assert read(tmp_path, M3 | {'text_config': text | fields})[1]['model.attention.rotary_dim'] == rotary_dim
  if 'rope_parameters' in fields:  # M3 as transformers writes it: with a rotary_dim that its class does not read
    fields = {'text_config': text | {'rotary_dim': 6} | fields}
    assert read(tmp_path, M3 | fields)[1]['model.attention.rotary_dim'] == rotary_dim


def without(fields, name):
  return {key: value for key, value in fields.items() if key != name}


def inside(**fields):
  return M3 | {'text_config': M3['text_config'] | fields}


def sparse(**fields):
  return inside(sparse_attention_config=M3['text_config']['sparse_attention_config'] | fields)


@pytest.mark.parametrize('fields, message', [
    ({'architectures': ['LlamaForCausalLM'], 'model_type': 'llama'},
     'architecture LlamaForCausalLM llama is not one of MiniMaxM2ForCausalLM, MiniMaxText01ForCausalLM'),
    ({'hidden_size': 3}, 'architecture not given is not one of'),
    (without(M2, 'num_local_experts'), 'config.json: lacks num_local_experts'),
    (without(M2, 'rope_theta'), 'config.json: lacks rope_theta'),
    (M2 | {'hidden_size': '3072'}, "model.d_model = '3072': expected int"),
    (M2 | {'num_hidden_layers': '62'}, "num_hidden_layers = '62': expected a positive number"),
    (without(M2, 'head_dim') | {'num_attention_heads': 0}, 'num_attention_heads = 0: expected a positive number'),
    (M2 | {'rope_parameters': {'partial_rotary_factor': 'half'}}, "partial_rotary_factor = 'half': expected a pos"),
    (M2 | {'rope_parameters': 5e6}, 'rope_parameters = 5000000.0: expected an object'),
    (M2 | {'hidden_act': 'gelu'}, "hidden_act = 'gelu': only 'silu' is implemented"),
    (M2 | {'qk_norm_type': 'per_head'}, "qk_norm_type = 'per_head': only 'per_layer' is implemented"),
    (M2 | {'scoring_func': 'softmax'}, "scoring_func = 'softmax': only 'sigmoid'"),
    (M2 | {'attn_type_list': [1] * 61 + [0]}, r'attn_type_list: 0 is unknown; known are \[1\]'),
    (M2 | {'attn_type_list': [1] * 60}, 'attn_type_list: expected a list of 62 entries'),
    (M2 | {'rope_scaling': {'rope_type': 'yarn'}}, "rope_scaling: rope_type = 'yarn': only 'default'"),
    (M2 | {'shared_intermediate_size': 512}, 'shared_intermediate_size = 512: only 0'),
    (TEXT01 | {'postnorm': False}, 'postnorm = False: only True'),
    (without(TEXT01, 'attn_type_list'), 'lacks layer_types'),
    (TEXT01 | {'attn_type_list': [2] * 80}, r'attn_type_list: 2 is unknown; known are \[0, 1\]'),
    (inside(swiglu_alpha=1.0), 'text_config: swiglu_alpha = 1.0: only 1.702'),
    (inside(swiglu_limit=10), 'swiglu_limit = 10: only 7.0'),
    (inside(hidden_act='relu'), "hidden_act = 'relu': only 'swigluoai'"),
    (inside(use_gemma_norm=False), 'use_gemma_norm = False: only True'),
    (inside(attention_output_gate=True), 'attention_output_gate = True'),
    (inside(moe_layer_freq=[1]), 'moe_layer_freq: expected a list of 60 entries'),
    (sparse(sparse_score_type='lse'), "sparse_score_type = 'lse': only 'max'"),
    (sparse(sparse_init_block=1), 'sparse_init_block = 1: only 0'),
    (sparse(sparse_num_index_heads=8), '8 index heads: only one for each of the 4 key-value heads'),
    (sparse(sparse_disable_index_value=[0] * 60), 'layer 3 has an index value'),
])
def test_what_is_not_implemented_is_said_in_one_line(fields, message, tmp_path):
  with pytest.raises(ConfigError, match=message) as told:
    config.override(config.Experiment(), read(tmp_path, fields)[1])
  assert '\n' not in str(told.value)


def test_a_file_that_is_no_config_says_so(tmp_path):
  with pytest.raises(ConfigError, match='config.json: No such file'):
    families.read_config(tmp_path)
  (tmp_path / 'config.json').write_text('{"a": ')
  with pytest.raises(ConfigError, match='config.json: no JSON'):
    families.read_config(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps([1]))
  with pytest.raises(ConfigError, match='expected an object, found list'):
    families.read_config(tmp_path)
