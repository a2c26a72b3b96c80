"""Small models of every family, and Hugging Face folders of them with random weights."""

import json

import numpy as np

import tiny

from mmx import checkpoint, checkpoint_params, config
from mmx.convert import m2, m3, safetensors_io, text01
from mmx.convert.mapping import tensors

FAMILIES = {'m2': m2.FAMILY, 'text01': text01.FAMILY, 'm3': m3.FAMILY}
ATTENTION = {'attention.num_heads': 4, 'attention.num_kv_heads': 2, 'attention.head_dim': 6, 'attention.rotary_dim': 4}
COMMON = ATTENTION | {
    'vocab_size': 19, 'd_model': 10, 'd_ff': 14, 'moe.num_experts': 3, 'moe.top_k': 2, 'moe.d_ff': 8,
}
MODELS = {
    'm2': COMMON | {'pattern': 'full*3'},
    'text01': COMMON | {
        'pattern': '(lightning*2 full)*2', 'lightning.num_heads': 4, 'lightning.head_dim': 6, 'lightning.chunk': 8,
        'attention.rotary_dim': 6, 'moe.bias_update_rate': 0.0, 'post_norm.ffn_alpha': 1.5,
    },
    'm3': COMMON | {
        'pattern': 'full/dense*2 msa msa/dense', 'msa.index_dim': 4, 'msa.block_size': 4, 'msa.top_k': 2,
        'moe.shared_d_ff': 6, 'moe.routed_scaling': 2.0,
    },
}


def model(family: str, **overrides) -> config.ModelConfig:
  """The small model of a family, with `moe__top_k=1` for 'moe.top_k'."""
  fields = FAMILIES[family].fixed | MODELS[family] | {k.replace('__', '.'): v for k, v in overrides.items()}
  return config.override(tiny.BASE, {f'model.{path}': value for path, value in fields.items()}).model


def shapes(model):
  """{our leaf: shape}."""
  leaves = checkpoint.named_leaves(checkpoint_params.abstract_variables(model))[0]
  return {name: leaf.shape for name, leaf in leaves.items()}


def write(folder, family, model, naming=0, seed=0, dtype=np.float32, max_shard_bytes=20_000):
  """Random weights under one of the family's namings; returns {name: array}."""
  chosen = list(tensors(model, family.namings[naming], shapes(model)))
  random = np.random.default_rng(seed)
  arrays = {tensor.name: random.normal(size=tensor.shape).astype(dtype) for tensor in chosen}
  write_arrays(folder, arrays, max_shard_bytes)
  write_config(folder, family.write(model))
  return arrays


def write_arrays(folder, arrays, max_shard_bytes=10**9):
  folder.mkdir(parents=True, exist_ok=True)
  for old in folder.glob('model*'):
    old.unlink()
  shapes = {name: array.shape for name, array in arrays.items()}
  dtypes = {name: array.dtype for name, array in arrays.items()}
  safetensors_io.write(folder, shapes, dtypes, iter(arrays.values()), max_shard_bytes)


def write_config(folder, fields):
  (folder / 'config.json').write_text(json.dumps(fields))
