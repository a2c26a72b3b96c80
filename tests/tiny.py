"""Small experiments and batches that the tests share."""

import jax.numpy as jnp
import numpy as np

from mmx import config

BASE = config.override(
    config.Experiment(),
    {
        'model.vocab_size': 61, 'model.d_model': 32, 'model.pattern': 'full*2', 'model.d_ff': 48,
        'model.attention.num_heads': 4, 'model.attention.num_kv_heads': 2,
        'model.attention.head_dim': 8, 'model.attention.rotary_dim': 4,
        'model.moe.num_experts': 8, 'model.moe.top_k': 2, 'model.moe.d_ff': 24,
        'data.seq_len': 24, 'data.batch_size': 8,
        'train.steps': 12, 'optim.warmup_steps': 2, 'optim.decay_steps': 4,
        'mesh.num_devices': 1,
    },
)


# Of an experiment file that trains in seconds on the texts of `write_texts`.
FIELDS = """
      'model.vocab_size': 260, 'model.d_model': 32,
      'model.attention.num_heads': 4, 'model.attention.num_kv_heads': 2,
      'model.attention.head_dim': 8, 'model.attention.rotary_dim': 4,
      'model.moe.num_experts': 8, 'model.moe.top_k': 2, 'model.moe.d_ff': 24,
      'data.source': 'text:texts', 'data.seq_len': 32, 'data.batch_size': 8, 'data.heldout_fraction': 0.2,
      'optim.warmup_steps': 2, 'optim.decay_steps': 4, 'train.steps': 12, 'train.log_every': 3,
      'train.checkpoint_every': 4, 'eval.batches': 2,"""


def write_texts(folder):
  """folder/texts: forty documents of random words, the same ones each time."""
  (folder / 'texts').mkdir()
  rng = np.random.default_rng(0)
  for number in range(40):
    words = rng.choice(['alpha', 'beta', 'gamma', 'delta'], (20, 9))
    (folder / 'texts' / f'{number:02d}.txt').write_text('\n'.join(map(' '.join, words)) + '\n')


def experiment(**overrides) -> config.Experiment:
  """BASE with `model__moe__top_k=3` for 'model.moe.top_k'."""
  return config.override(BASE, {path.replace('__', '.'): value for path, value in overrides.items()})


def batch(base: config.Experiment = BASE, seed=0):
  """Random tokens in packed documents: three segments a row, no padding but in the last row."""
  rng = np.random.default_rng(seed)
  B, T = base.data.batch_size, base.data.seq_len
  tokens = rng.integers(0, base.model.vocab_size, (B, T + 1))
  segments = np.sort(rng.integers(1, 4, (B, T)), axis=1)
  starts = np.concatenate([np.ones((B, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
  positions = np.arange(T) - np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)
  mask = np.concatenate([segments[:, 1:] == segments[:, :-1], np.ones((B, 1), bool)], axis=1)
  segments[-1, T // 2 :], mask[-1, T // 2 - 1 :] = 0, False
  fields = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segment_ids': segments, 'positions': positions}
  return {name: jnp.asarray(a, jnp.int32) for name, a in fields.items()} | {'loss_mask': jnp.asarray(mask, jnp.float32)}
