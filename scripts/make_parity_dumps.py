"""Writes small random checkpoints of every family with the logits that transformers computes from them.

  pip install -e '.[hf]'
  python scripts/make_parity_dumps.py --output=tests/golden/parity

Every parameter is random, norm weights and router biases too: at their defaults of 1 and 0 a norm over the wrong width
or a bias in the wrong place would not show. Each case is a folder that `python -m mmx.convert verify` takes, with
reference.npz beside the weights: tokens [B, T], logits [B, T, V] in float32, eager attention, loop over experts.
"""

import json
import pathlib
import shutil

import numpy as np
from absl import app, flags

OUTPUT = flags.DEFINE_string('output', 'tests/golden/parity', 'Folder for the cases; each is replaced.')
ONLY = flags.DEFINE_list('only', None, 'Cases to write; all if left out.')

VOCAB = 61
BASE = {
    'vocab_size': VOCAB, 'hidden_size': 32, 'head_dim': 8, 'bos_token_id': None, 'eos_token_id': None,
    'attn_implementation': 'eager', 'experts_implementation': 'eager',
}
FP8_BLOCK = 16  # small, so that a tiny matrix has several blocks and cut ones

# case: (family, fields of its config, [B, T] of the tokens, how it is saved)
CASES = {
    'm2_groups_of_2': (
        'm2',
        {'num_attention_heads': 4, 'num_key_value_heads': 2, 'rotary_dim': 4, 'num_local_experts': 6,
         'num_experts_per_tok': 3, 'intermediate_size': 12, 'num_hidden_layers': 3, 'rms_norm_eps': 1e-3},
        (2, 23), {'max_shard_size': '60KB'},
    ),
    'm2_groups_of_1_whole_head_rotates': (
        'm2',
        {'num_attention_heads': 2, 'num_key_value_heads': 2, 'num_local_experts': 4, 'num_experts_per_tok': 1,
         'intermediate_size': 16, 'num_hidden_layers': 1},
        (1, 37), {'save_original_format': False},
    ),
    'm2_float8': (
        'm2',
        {'num_attention_heads': 4, 'num_key_value_heads': 1, 'rotary_dim': 4, 'num_local_experts': 4,
         'num_experts_per_tok': 2, 'intermediate_size': 24, 'num_hidden_layers': 2, 'hidden_size': 40},
        (2, 19), {'float8': True},
    ),
    'text01_lightning_3_full_1': (
        'text01',
        {'num_attention_heads': 4, 'num_key_value_heads': 2, 'num_local_experts': 4, 'num_experts_per_tok': 2,
         'intermediate_size': 16, 'num_hidden_layers': 4, 'block_size': 8, 'layer_types': 'LLLF',
         'full_attn_alpha_factor': 1.7, 'full_attn_beta_factor': 0.9, 'linear_attn_alpha_factor': 1.4,
         'linear_attn_beta_factor': 1.1, 'mlp_alpha_factor': 1.9, 'mlp_beta_factor': 0.8},
        (2, 21), {},
    ),
    'text01_full_first_groups_of_1': (
        'text01',
        {'num_attention_heads': 2, 'num_key_value_heads': 2, 'num_local_experts': 3, 'num_experts_per_tok': 1,
         'intermediate_size': 16, 'num_hidden_layers': 3, 'block_size': 16, 'layer_types': 'FLF', 'head_dim': 12},
        (1, 48), {'save_original_format': False},
    ),
    'm3_fewer_blocks_chosen_than_there_are': (
        'm3',
        {'num_attention_heads': 4, 'num_key_value_heads': 2, 'num_local_experts': 4, 'num_experts_per_tok': 2,
         'num_hidden_layers': 3, 'layers': 'FSS', 'ffns': 'dmm', 'index_block_size': 4, 'index_topk_blocks': 3},
        (2, 29), {},
    ),
    'm3_more_blocks_chosen_than_there_are_with_vision': (
        'm3',
        {'num_attention_heads': 2, 'num_key_value_heads': 2, 'num_local_experts': 3, 'num_experts_per_tok': 1,
         'num_hidden_layers': 2, 'layers': 'SF', 'ffns': 'mm', 'index_block_size': 8, 'index_topk_blocks': 16},
        (2, 22), {'vision': True, 'max_shard_size': '80KB'},
    ),
    'm3_groups_of_4_whole_blocks_released_names': (
        'm3',
        {'num_attention_heads': 4, 'num_key_value_heads': 1, 'num_local_experts': 4, 'num_experts_per_tok': 2,
         'num_hidden_layers': 2, 'layers': 'SS', 'ffns': 'md', 'index_block_size': 8, 'index_topk_blocks': 2,
         'index_head_dim': 12, 'routed_scaling_factor': 1.3},
        (1, 48), {'vision': True, 'text_only': True},
    ),
}


def build(family, fields):
  """transformers' model and, of M3, the model around it that has the vision tower."""
  import transformers
  from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3_vl

  fields = BASE | fields
  if family == 'm2':
    return transformers.MiniMaxM2ForCausalLM(transformers.MiniMaxM2Config(**fields))
  if family == 'text01':
    fields['layer_types'] = [{'L': 'linear_attention', 'F': 'full_attention'}[one] for one in fields['layer_types']]
    return transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**fields))
  kinds = {'S': 'minimax_m3_sparse', 'F': 'full_attention', 'm': 'sparse', 'd': 'dense'}
  fields['layer_types'] = [kinds[one] for one in fields.pop('layers')]
  fields['mlp_layer_types'] = [kinds[one] for one in fields.pop('ffns')]
  fields |= {
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e6, 'partial_rotary_factor': 0.5}, 'rotary_dim': 4,
      'intermediate_size': 12, 'dense_intermediate_size': 20, 'shared_intermediate_size': 16,
      'index_n_heads': fields['num_key_value_heads'], 'index_head_dim': fields.get('index_head_dim', 8),
  }
  return m3_vl.MiniMaxM3VLForCausalLM(m3_vl.MiniMaxM3VLTextConfig(**fields))


def randomise(model, seed):
  """Weights of unit gain, M3's gate and up of 3, so that the clamp at 7 cuts some; norms by 0.3, biases by 0.2."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  draw = lambda tensor: torch.randn(tensor.shape, generator=generator)
  named = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n.endswith('correction_bias')}
  with torch.no_grad():
    for name, tensor in sorted(named.items()):
      if name.endswith('correction_bias'):
        tensor.copy_(0.2 * draw(tensor))
      elif tensor.ndim == 1:
        tensor.add_(0.3 * draw(tensor))
      else:
        gain = 3.0 if 'gate_up' in name and 'M3' in type(model).__name__ else 1.0
        tensor.copy_(gain * draw(tensor) / tensor.shape[-1] ** 0.5)


def save(model, folder, seed, *, vision=False, text_only=False, **options):
  """The folder of the case, in the format that the case asks for."""
  from safetensors.torch import load_file, save_file
  from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3_vl

  if vision:
    around = m3_vl.MiniMaxM3VLConfig(
        text_config=model.config.to_dict(), projector_hidden_size=16,
        vision_config={'hidden_size': 12, 'intermediate_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 1,
                       'image_size': 8, 'patch_size': 4, 'spatial_merge_size': 1},
    )
    whole = m3_vl.MiniMaxM3SparseForConditionalGeneration(around)
    randomise(whole, seed)
    whole.model.language_model.load_state_dict(model.model.state_dict())
    whole.lm_head.load_state_dict(model.lm_head.state_dict())
    whole.save_pretrained(folder, **options)
  else:
    model.save_pretrained(folder, **options)
  (folder / 'generation_config.json').unlink(missing_ok=True)
  file = folder / 'model.safetensors'
  if text_only:  # the released names of the text model, without the whole around it
    text = {name: tensor for name, tensor in load_file(file).items() if name.startswith('language_model.')}
    save_file({name.removeprefix('language_model.'): tensor for name, tensor in text.items()}, file)
    (folder / 'config.json').write_text(model.config.to_json_string())


def quantise(folder):
  """Float8 weights with scales in blocks, as in released files; returns the model of what is left of the weights."""
  import torch
  import transformers
  from safetensors.torch import load_file, save_file

  file, kept, quantised = folder / 'model.safetensors', {}, {}
  for name, weight in load_file(file).items():
    if weight.ndim != 2 or name in ('lm_head.weight', 'model.embed_tokens.weight') or name.endswith('.gate.weight'):
      kept[name] = quantised[name] = weight
      continue
    rows, columns = (-(-size // FP8_BLOCK) for size in weight.shape)
    kept[name], scales = torch.zeros_like(weight), torch.zeros(rows, columns)
    quantised[name] = torch.zeros_like(weight, dtype=torch.float8_e4m3fn)
    for row in range(rows):
      for column in range(columns):
        block = tuple(slice(i * FP8_BLOCK, (i + 1) * FP8_BLOCK) for i in (row, column))
        scales[row, column] = weight[block].abs().max() / 448  # the largest float8
        quantised[name][block] = (weight[block] / scales[row, column]).to(torch.float8_e4m3fn)
        kept[name][block] = quantised[name][block].float() * scales[row, column]
    quantised[f'{name}_scale_inv'] = scales
  save_file(kept, file, metadata={'format': 'pt'})
  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, attn_implementation='eager', experts_implementation='eager')
  save_file(quantised, file, metadata={'format': 'pt'})
  fields = json.loads((folder / 'config.json').read_text())
  fields['quantization_config'] = {
      'quant_method': 'fp8', 'fmt': 'float8_e4m3fn', 'weight_block_size': [FP8_BLOCK, FP8_BLOCK]
  }
  (folder / 'config.json').write_text(json.dumps(fields, indent=2) + '\n')
  return model


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}; every option starts with --')
  import torch

  for seed, (case, (family, fields, shape, options)) in enumerate(CASES.items()):
    if ONLY.value and case not in ONLY.value:
      continue
    folder = pathlib.Path(OUTPUT.value) / case
    shutil.rmtree(folder, ignore_errors=True)
    model = build(family, fields)
    randomise(model, seed)
    save(model, folder, seed, **{name: value for name, value in options.items() if name != 'float8'})
    if options.get('float8'):
      model = quantise(folder)
    tokens = np.random.default_rng(seed).integers(0, VOCAB, shape, np.int32)
    with torch.no_grad():
      logits = model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.savez(folder / 'reference.npz', tokens=tokens, logits=logits)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f'{case}: {size / 1e3:.0f} kB, logits up to {np.abs(logits).max():.2f}')


if __name__ == '__main__':
  app.run(main)
