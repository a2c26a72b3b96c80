"""What one layer's attention costs as the context grows: MSA against full attention, Lightning, sliding windows.

  python scripts/bench_attention.py --output=docs/results/bench_attention_cpu.json

Everything goes through the functions of mmx.kernels_pallas.api that the layers call; projections are left out. Heads
are those of MiniMax-M3: 64 queries and 4 keys of 128 dimensions, blocks of 128, k = 16; float32 on both sides, as CPUs
have no fast bfloat16 products. Keys are random, so that a query's blocks lie anywhere and neighbours share few: for MSA
the hardest case.

  decode     one new token behind a cache of the given length, full and MSA by turns on the same cache.
  prefill    the last tokens of a prompt of the given length, full and MSA by turns. The whole prompt is not run: full
             attention would take hours. Under full attention the last tokens cost twice the mean of the prompt.
  lightning  one new token from the state, which has one size whatever the context was.
  sliding    one new token behind the cache of a window, and a whole prompt.

Ratios stand beside those of the paper's cost model (MSA, section 3.1: mean FLOPs a token over a causal prompt), of the
FLOPs that these queries take, and of the bytes of cache that they must read.
"""

import functools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import measuring
import numpy as np
from absl import app, flags
from measuring import spread

from mmx import config
from mmx.kernels_pallas import api
from mmx.layers import lightning, sliding

PARTS = 'decode', 'prefill', 'lightning', 'sliding'
PART = flags.DEFINE_multi_enum('part', PARTS, PARTS, 'What to measure; repeat it for several.')
CONTEXT = flags.DEFINE_multi_integer('context', [2**n for n in range(13, 21)], 'Tokens of context for decode.', 1024)
PREFILL = flags.DEFINE_integer('prefill', 2**17, 'Tokens of the prompt for prefill.', 1024)
QUERIES = flags.DEFINE_integer('queries', 256, 'Its last tokens, those that are computed.', 1)
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Turns of each side; the median counts.', 1)
OUTPUT = flags.DEFINE_string('output', None, 'JSON file for the figures; none is written if left out.')

H, K, DH, DI = 64, 4, 128, 128
BLOCK, TOP_K = 128, 16
WINDOW = 1024
CPU = {'implementation': 'auto', 'platform': 'cpu'}
TURN = 0.05  # seconds that a turn lasts at least: calls are repeated


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}; every option starts with --')
  result = provenance()
  for part in PART.value:
    result[part] = {'decode': decode, 'prefill': prefill, 'lightning': lightning_decode, 'sliding': window}[part]()
  if OUTPUT.value:
    path = pathlib.Path(OUTPUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + '\n')


def provenance():
  return measuring.machine('jax', 'jaxlib') | {
      'device': jax.devices()[0].platform, 'dtype': 'float32',
      'heads': {'query': H, 'key': K, 'dim': DH, 'index_dim': DI, 'block': BLOCK, 'top_k': TOP_K, 'window': WINDOW},
      'rounds': ROUNDS.value,
  }


# ----------------------------------------------------------------------------------------------------------------------
# measuring


def seconds(sides):
  """{name: seconds of one call, of every round} for {name: (compiled function, arguments)}, the sides by turns."""
  turns = {}
  for name, (function, arguments) in sides.items():
    once(function, arguments)  # the first call settles memory
    repeats = max(1, round(TURN / once(function, arguments)))
    turns[name] = functools.partial(once, function, arguments, repeats)
  return measuring.by_turns(turns, ROUNDS.value)


def once(function, arguments, repeats=1):
  began = time.perf_counter()
  for _ in range(repeats):
    jax.block_until_ready(function(*arguments))
  return (time.perf_counter() - began) / repeats


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


# ----------------------------------------------------------------------------------------------------------------------
# MSA against full attention


def paper_flop_ratio(N):
  """F_GQA / F_MSA of a causal prompt of N tokens (MSA, section 3.1)."""
  return 2 * H * DH * N / (K * DI * N + 4 * H * DH * TOP_K * BLOCK)


def against_full(context, queries):
  """Figures for the last `queries` tokens of `context`, whose cache holds them already."""
  cache = {name: normal(i, 1, *shape) for i, (name, shape) in enumerate(
      {'k': (K, context, DH), 'v': (K, context, DH), 'index_k': (context, DI)}.items())}
  q_BTHDh, index_q_BTKDi = normal(3, 1, queries, H, DH), normal(4, 1, queries, K, DI)
  slots_BT = jnp.arange(context - queries, context, dtype=jnp.int32)[None]
  full = jax.jit(api.attend_cached), (q_BTHDh, cache['k'], cache['v'], slots_BT)
  cached = functools.partial(api.msa_cached, block_size=BLOCK, **CPU)
  msa = jax.jit(functools.partial(cached, top_k=TOP_K)), (
      q_BTHDh, cache['k'], cache['v'], index_q_BTKDi, cache['index_k'], slots_BT
  )
  if context <= 4 * TOP_K * BLOCK:  # that neither side passes by computing something else
    all_blocks = cached(*msa[1], top_k=-(-context // BLOCK))
    np.testing.assert_allclose(all_blocks, full[0](*full[1]), atol=1e-4)

  rounds = seconds({'full': full, 'msa': msa})
  selected, item = min(context, TOP_K * BLOCK), 4
  bytes_read = {
      'full': 2 * context * K * DH * item,
      'msa': context * DI * item + 2 * min(context, queries * selected) * K * DH * item,
  }
  flops = {  # of each query: scores and values; index scores and the same over the selected tokens
      'full': 4 * H * DH * context,
      'msa': 2 * K * DI * context + 4 * H * DH * selected,
  }
  figures = {
      'context': context, 'queries': queries,
      'seconds': {name: spread(values) for name, values in rounds.items()},
      'ratio': spread([full / msa for full, msa in zip(rounds['full'], rounds['msa'])]),
      'paper_flop_ratio': paper_flop_ratio(context), 'flop_ratio': flops['full'] / flops['msa'],
      'bytes_read': bytes_read, 'bytes_ratio': bytes_read['full'] / bytes_read['msa'],
      'gflop_per_second': {
          name: queries * flops[name] / statistics.median(values) / 1e9 for name, values in rounds.items()
      },
  }
  times = '   '.join(f'{name} {1e3 * figures["seconds"][name]["median"]:9.1f} ms' for name in ('full', 'msa'))
  ratio = figures['ratio']
  print(
      f'{context:>9,} tokens   {times}   ratio {ratio["median"]:5.1f} ({ratio["min"]:.1f} to {ratio["max"]:.1f})   '
      f'FLOPs {figures["flop_ratio"]:4.1f}, paper\'s model {figures["paper_flop_ratio"]:4.1f}   '
      f'read {bytes_read["full"] / 2**20:,.0f} and {bytes_read["msa"] / 2**20:,.0f} MiB, '
      f'{figures["bytes_ratio"]:.1f} times', flush=True,
  )
  return figures


def decode():
  print('Decode, one token: full attention against MSA')
  return [against_full(context, 1) for context in CONTEXT.value]


def prefill():
  print(f'Prefill, the last {QUERIES.value} tokens of the prompt: full attention against MSA')
  return against_full(PREFILL.value, min(QUERIES.value, PREFILL.value))


# ----------------------------------------------------------------------------------------------------------------------
# what does not grow


def served(name):
  """The model whose caches are measured."""
  heads = {'num_heads': H, 'head_dim': DH}
  return config.override(config.Experiment(), {'model.pattern': f'{name}*2', 'model.sliding.window': WINDOW} | {
      f'model.attention.{field}': size for field, size in (heads | {'num_kv_heads': K}).items()} | {
      f'model.lightning.{field}': size for field, size in heads.items()}).model


def megabytes(cache):
  return sum(a.nbytes for a in jax.tree.leaves(cache)) / 2**20


def show(context, name, rounds, cache):
  figures = {'context': context, 'seconds': spread(rounds[name]), 'cache_MiB': megabytes(cache)}
  print(f'{context:>9,} tokens   {1e3 * figures["seconds"]["median"]:8.2f} ms   cache {figures["cache_MiB"]:.1f} MiB')
  return figures


def lightning_decode():
  """Contexts by turns. The state is random: a step reads it whole and asks nothing else of the past."""
  print('Lightning decode, one token')
  contexts = [2**n for n in range(10, 21, 2)]
  caches = {N: lightning.init_cache(served('lightning'), 1, N, jnp.float32) for N in contexts}
  caches = {N: cache | {'state': normal(N, *cache['state'].shape)} for N, cache in caches.items()}
  q, k, v = (normal(i, 1, 1, H, DH) for i in range(3))
  slopes = lightning.slopes(H, 0, 2)
  segments = jnp.ones((1, 1), jnp.int32)
  step = jax.jit(lambda q, k, v, state: api.lightning(q, k, v, slopes, segments, state, chunk=64, **CPU))
  rounds = seconds({N: (step, (q, k, v, cache['state'])) for N, cache in caches.items()})
  return [show(N, N, rounds, cache) for N, cache in caches.items()]


def window():
  """Decode from the ring of a window, and whole prompts: time a token."""
  print(f'Sliding window of {WINDOW}: decode, one token')
  contexts = [2**n for n in range(10, 21, 2)]
  q = normal(0, 1, 1, H, DH)
  step = jax.jit(lambda *a: api.sliding_slots(*a, window=WINDOW, sink_tokens=0))
  caches, sides = {}, {}
  for N in contexts:
    cache = sliding.init_cache(served('sliding'), 1, N, jnp.float32)
    slots = cache['positions'].shape[1]
    last = jnp.arange(N - slots, N, dtype=jnp.int32)
    caches[N] = {name: normal(N, *cache[name].shape) for name in 'kv'} | {
        'positions': jnp.zeros((1, slots), jnp.int32).at[0, last % slots].set(last)
    }
    sides[N] = step, (q, caches[N]['k'], caches[N]['v'], caches[N]['positions'], jnp.full((1, 1), N - 1, jnp.int32))
  rounds = seconds(sides)
  decoding = [show(N, N, rounds, cache) for N, cache in caches.items()]

  print(f'Sliding window of {WINDOW}: prompts')
  prompt = jax.jit(lambda q, k, v, positions: api.sliding(
      q, k, v, jnp.ones_like(positions), positions, window=WINDOW, sink_tokens=0, **CPU))
  sides = {N: (prompt, (normal(0, 1, N, H, DH), normal(1, 1, N, K, DH), normal(2, 1, N, K, DH),
                        jnp.arange(N, dtype=jnp.int32)[None])) for N in (2**12, 2**13, 2**14)}
  prompts = []
  for N, values in seconds(sides).items():
    prompts.append({'context': N, 'seconds_per_token': spread([value / N for value in values])})
    print(f'{N:>9,} tokens   {1e3 * prompts[-1]["seconds_per_token"]["median"]:8.3f} ms a token', flush=True)
  return {'decode': decoding, 'prompt': prompts}


if __name__ == '__main__':
  app.run(main)
