"""Kernels on whatever device jax finds: first whether they compute the right thing there, then how fast.

  python scripts/bench_kernels.py --output=docs/results/kernels_h200.json
  python scripts/bench_kernels.py --kernel=msa_prefill --shapes=128k,1M
  python scripts/bench_kernels.py --kernel=msa_decode --shapes=1M,8@1M     # one token, and 8, behind a million
  python scripts/plot_kernels.py                                           # docs/kernels.md from all such files

A prompt of a million tokens takes more than the three quarters of a GPU that jax asks for by itself:
XLA_PYTHON_CLIENT_MEM_FRACTION=.95.

1. Every implementation, and every peer, is held against the oracle in float32 on the device, at a small shape of odd
   length and, where packing is the kernel's matter, of two documents. One that is beyond tolerance ends the run.
2. Two ceilings are measured: the rate of large matrix products in this dtype, and of a stream that is read and written.
3. Ours and its peers are timed by turns. Calls are queued without waiting for each other, each takes the memory of the
   last one's result, and the clock stops when the last is done; the median of the rounds counts, beside the lowest and
   the highest. A shape is compiled before anything is allocated and left out, in one line, if it would not fit.

Printed for each: time, FLOP/s and bytes/s (what the algorithm asks for: kernel_cases.py), the share of the roofline,
which is the larger of the two shares of the ceilings, and how many times as fast as the fastest of the peers.
Keys are random: a query's blocks lie anywhere, and neighbours share few. That is the hardest case for MSA.
"""

import argparse
import json
import math
import pathlib
import re
import sys
import time
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import kernel_cases
import measuring
import numpy as np
from kernel_cases import KERNELS, Drawn, Options, Shape, Torch

from mmx import command
from mmx.kernels_pallas.api import UnsupportedError

M3_HEADS = 64, 4, 128, 128
M2_EXPERTS = 3072, 1536, 256, 8
SMALL_EXPERTS = 768, 384, 32, 4  # for CPUs: the same shape of problem in 1/256 of the memory
CHECKED_EXPERTS = 8  # as the oracle computes every expert for every token
LONGEST = 1 << 20
DOUBLINGS = [(1 << n, 1 << n) for n in range(13, 21)]
# Shapes (context, queries) if none are given. On a CPU full attention over a long prompt would take hours: the last
# queries stand for it.
ACCELERATOR_SHAPES = {
    'attention': DOUBLINGS, 'attention_train': DOUBLINGS[:5], 'msa_prefill': DOUBLINGS, 'msa_train': DOUBLINGS[:5],
    'msa_decode': [(N, 1) for N, _ in DOUBLINGS], 'index': DOUBLINGS, 'lightning': DOUBLINGS[:5],
    'experts': [(4096, 4096), (16384, 16384)], 'experts_train': [(4096, 4096), (16384, 16384)],
}  # fmt: skip
CPU_SHAPES = {
    'attention': [(1024, 1024)], 'attention_train': [(1024, 1024)], 'msa_train': [(1024, 1024)],
    'msa_prefill': [(1 << n, 256) for n in (13, 15, 17)], 'msa_decode': [(1 << n, 1) for n in range(13, 21)],
    'index': [(1 << 15, 256)], 'lightning': [(1024, 1024)], 'experts': [(1024, 1024)], 'experts_train': [(1024, 1024)],
}  # fmt: skip
TURN = {'cpu': 0.05}  # seconds that a turn lasts at least: calls are repeated
ACCELERATOR_TURN = 0.2
LONG_TURN = 5.0  # seconds; of such turns three rounds are enough
HEADROOM = 0.95  # of the free memory


class Unfit(RuntimeError):
  """A shape or peer that is left out; one line says why."""


# ----------------------------------------------------------------------------------------------------------------------
# the command


def main(argv=None):
  args = parse(argv)
  device = jax.devices()[0]
  cpu = device.platform == 'cpu'
  o = Options(
      device.platform, jnp.dtype(args.dtype or ('float32' if cpu else 'bfloat16')), args.heads, args.block, args.top_k,
      args.experts or (SMALL_EXPERTS if cpu else M2_EXPERTS), args.index_dtype and jnp.dtype(args.index_dtype),
  )
  kernels = args.kernel or list(KERNELS)
  result = measuring.machine('jax', 'jaxlib') | {
      'device': device.platform, 'device_kind': device.device_kind, 'dtype': o.dtype.name,
      'heads': dict(zip(('query', 'key', 'dim', 'index_dim'), o.heads)), 'block': o.block, 'top_k': o.top_k,
      'index_dtype': (o.index_dtype or o.dtype).name,
      'experts': dict(zip(('d_model', 'd_ff', 'experts', 'top_k'), o.experts)), 'rounds': args.rounds,
      'numerics': [], 'cases': [], 'left_out': [],
  }
  shapes = {kernel: to_measure(kernel, args.shapes, cpu) for kernel in kernels}
  print(f'{result["cpu"] if cpu else device.device_kind}, {o.dtype.name}, heads {"/".join(map(str, o.heads))}, '
        f'blocks of {o.block}, k = {o.top_k}\n\nLargest difference from the oracle, of its largest value')
  chosen = {}
  for kernel in kernels:
    chosen[kernel] = choose(kernel, shapes[kernel][0], args.implementation, o)
    result['numerics'] += numerics(kernel, chosen[kernel], o)

  result['ceilings'] = ceilings(o, args.rounds)
  print(f'\nCeilings: products {result["ceilings"]["flops_per_second"]["median"] / 1e12:.4g} TFLOP/s, '
        f'stream {result["ceilings"]["bytes_per_second"]["median"] / 1e9:.4g} GB/s')
  print(f'\n{"kernel":16} {"form":24} {"shape":>10} {"ms (lowest to highest)":>32} {"TFLOP/s":>9} {"GB/s":>8} '
        f'{"roofline":>9}   against the fastest peer')
  for kernel in kernels:
    for shape in shapes[kernel]:
      for name in chosen[kernel]:
        try:
          result['cases'].append(measure(kernel, shape, name, o, args.rounds, result['ceilings']))
        except Unfit as reason:
          result['left_out'].append(f'{kernel} {name} {shown(shape)}: {reason}')
          print(result['left_out'][-1], flush=True)
        if args.output:  # after each, so that what is done is kept
          args.output.parent.mkdir(parents=True, exist_ok=True)
          args.output.write_text(json.dumps(result, indent=1) + '\n')


def parse(argv):
  parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  parser.add_argument('--kernel', action='append', choices=KERNELS, help='repeat it for several; all if left out')
  parser.add_argument('--shapes', type=shapes_of, help='tokens, as 8k,1M; or queries@tokens, the last of a context')
  parser.add_argument('--implementation', action='append', help='by name, several by repeating; the first that serves')
  parser.add_argument('--dtype', choices=('bfloat16', 'float32'), help='float32 on CPU, else bfloat16')
  parser.add_argument('--index_dtype', choices=('float8_e4m3fn',), help="of MSA's index heads, but in training")
  parser.add_argument('--rounds', type=number, default=5, help='turns of each side; the median counts')
  parser.add_argument('--output', type=pathlib.Path, help='JSON file; docs/results/kernels_DEVICE.json is plotted')
  parser.add_argument('--heads', type=numbers(4), default=M3_HEADS, help='query, key heads, their and the index dim')
  parser.add_argument('--block', type=number, default=128)
  parser.add_argument('--top_k', type=number, default=16)
  parser.add_argument('--experts', type=numbers(4), help='d_model, d_ff, experts, experts a token')
  args = parser.parse_args(argv)
  if args.heads[0] % args.heads[1]:
    parser.error(f'argument --heads: {args.heads[0]} query heads do not divide among {args.heads[1]} key heads')
  if args.experts and args.experts[3] > args.experts[2]:
    parser.error(f'argument --experts: {args.experts[3]} experts a token of {args.experts[2]}')
  for context, queries in args.shapes or ():
    for kernel in args.kernel or KERNELS:
      if queries != context and kernel not in ('msa_prefill', 'msa_decode', 'index'):
        parser.error(f'argument --shapes: {kernel} takes whole rows, not {queries}@{context}')
  return args


def to_measure(kernel, given, cpu):
  """Shapes of a kernel; tokens alone mean the whole row, but for decoding one token behind them."""
  shapes = given or (CPU_SHAPES if cpu else ACCELERATOR_SHAPES)[kernel]
  return [Shape(N, 1 if kernel == 'msa_decode' and T == N else T) for N, T in shapes]


def number(text):
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f'{text!r} is not a positive whole number')
  return int(text)


def numbers(count):
  def parse_all(text):
    if len(parts := text.split(',')) != count:
      raise argparse.ArgumentTypeError(f'{text!r} is not {count} numbers with commas between')
    return tuple(map(number, parts))

  return parse_all


def shapes_of(text):
  """'8k,256@1M' -> [(8192, 8192), (1048576, 256)]: (context, queries)."""
  shapes = []
  for part in text.split(','):
    found = re.fullmatch(r'(?:(\d+)@)?(\d+)([kM]?)', part)
    context = int(found[2]) * {'': 1, 'k': 1 << 10, 'M': 1 << 20}[found[3]] if found else 0
    queries = int(found[1] or context) if found else 0
    if not 0 < queries <= context <= LONGEST:
      raise argparse.ArgumentTypeError(f'{part!r} is no shape; 8k, 1M or 256@128k, up to 1M')
    shapes.append((context, queries))
  return shapes


def shown(shape):
  context, queries = shape
  units = [f'{context >> bits}{unit}' for bits, unit in ((20, 'M'), (10, 'k')) if context % (1 << bits) == 0]
  size = units[0] if units else str(context)
  return size if queries == context else f'{queries}@{size}'


# ----------------------------------------------------------------------------------------------------------------------
# numerics


def choose(kernel, shape, named, o):
  """The implementations to measure: those named, or the first that serves platform and shape."""
  case = KERNELS[kernel](o, shape)
  for name in named or kernel_cases.implementations(kernel, o):
    try:
      jax.eval_shape(case.ours(name).function, abstract(case.arguments, o))
    except UnsupportedError as error:
      if named:
        command.stop(f'{kernel}: {error}')
      continue
    if not named:
      return [name]
  return named


def numerics(kernel, names, o):
  """Checks at a small shape; the figures, or the end of the command."""
  figures = []
  for name in names:
    few, odd, case = checked(kernel, name, o)
    figures.append(compare(kernel, case, case.ours(name), case.oracle, odd, few))
  shape = even(odd)
  case = KERNELS[kernel](few, shape)
  for peer in case.peers:
    if peer.function is not case.dense_oracle and peer.name not in names:
      figures.append(compare(kernel, case, peer, case.dense_oracle, shape, few))
  return figures


def checked(kernel, name, o):
  """(Options, shape, case) at which an implementation is held against the oracle."""
  context = 3 * o.block + 37
  odd = Shape(context, {'msa_decode': 1}.get(kernel, context))
  few = o._replace(top_k=min(o.top_k, 2), experts=(*o.experts[:2], *(min(n, CHECKED_EXPERTS) for n in o.experts[2:])))
  case = KERNELS[kernel](few, odd, 2)
  try:
    jax.eval_shape(case.ours(name).function, abstract(case.arguments, few))
  except UnsupportedError:  # some take multiples of 128 only
    odd = even(odd)
    case = KERNELS[kernel](few, odd, 2)
  return few, odd, case


def even(shape):
  context = -(-shape.context // 128) * 128
  return Shape(context, context if shape.queries == shape.context else shape.queries)


def compare(kernel, case, side, oracle, shape, o):
  """The greatest error of a side on the device; ends the command if it is beyond tolerance."""
  tolerance = 1e-4 if o.platform == 'cpu' and o.dtype == jnp.float32 else 3e-2  # float32 is TF32 or bfloat16 elsewhere
  arguments = draw(case, o)
  floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
  wide = {name: x.astype(jnp.float32) if floating(x) else x for name, x in arguments.items()}
  with jax.default_matmul_precision('highest'):
    expected = jax.jit(oracle)(wide)
  try:
    found = jax.jit(side.function)(arguments) if not torch_side(side) else with_torch(side, arguments)
  except UnsupportedError as error:
    command.stop(f'{kernel}, {side.name}: {error}')
  if kernel == 'index':
    expected, found = (scores_of(ids, wide, o) for ids in (expected, found))
  error = max(
      float(np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-30))
      for x, y in zip(map(as_float, jax.tree.leaves(found)), map(as_float, jax.tree.leaves(expected)), strict=True)
  )
  print(f'{kernel:16} {side.name:24} {shown(shape):>10}   {error:.1e}', flush=True)
  if not error <= tolerance:  # NaN as well
    command.stop(f'{kernel}, {side.name}: off by {error:.1e} of the largest value at {shown(shape)} tokens, more than '
                 f'{tolerance:.0e} in {o.dtype.name}; nothing was timed')
  return {'kernel': kernel, 'implementation': side.name, 'context': shape.context, 'queries': shape.queries,
          'error': error, 'tolerance': tolerance}  # fmt: skip


def as_float(x):
  return np.asarray(jax.device_get(x), np.float32)


def scores_of(ids_BTKk, a, o):
  """Largest index score of each chosen block, highest first: equal for equally good choices."""
  N, b = a['index_k'].shape[1], o.block
  scores_BTKS = jnp.einsum('btkd,bsd->btks', a['index_q'], a['index_k'], precision='highest') * o.heads[3] ** -0.5
  scores_BTKS = jnp.where(jnp.arange(N)[None, None, None] <= a['slots'][:, :, None, None], scores_BTKS, -1e30)
  padded = jnp.pad(scores_BTKS, ((0, 0),) * 3 + ((0, -N % b),), constant_values=-1e30)
  pooled_BTKP = jnp.max(padded.reshape(*padded.shape[:3], -1, b), axis=-1)
  chosen_BTKk = jnp.take_along_axis(pooled_BTKP, jnp.maximum(ids_BTKk, 0), axis=-1)
  return -jnp.sort(-jnp.where(ids_BTKk >= 0, chosen_BTKk, 0), axis=-1)


# ----------------------------------------------------------------------------------------------------------------------
# memory


def abstract(arguments, o):
  """What a case's arguments will be, before there is memory for them."""
  return {name: jax.ShapeDtypeStruct(x.shape, x.dtype or o.dtype) for name, x in arguments.items()}


PIECE = 1 << 20  # numbers drawn at once: random bits of a whole prompt would need more memory than the prompt


def draw(case, o):
  """The case's arguments on the device."""
  def normal(key, shape, scale, dtype):
    size = math.prod(shape)
    piece = lambda i: (jax.random.normal(jax.random.fold_in(key, i), (min(size, PIECE),)) * scale).astype(dtype)
    pieces = jax.lax.map(piece, jnp.arange(-(-size // PIECE)))
    return pieces.reshape(-1)[:size].reshape(shape)

  normal = jax.jit(normal, static_argnums=(1, 2, 3))
  arguments = {
      name: normal(jax.random.key(i), *x._replace(dtype=x.dtype or o.dtype)) if isinstance(x, Drawn) else jnp.asarray(x)
      for i, (name, x) in enumerate(case.arguments.items())
  }
  return arguments | jax.jit(case.derived)(arguments)


def free_bytes(device):
  """Of the device, or None where it does not say."""
  if device.platform == 'cpu':
    lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable'))
  stats = device.memory_stats() or {}
  return stats['bytes_limit'] - stats['bytes_in_use'] if 'bytes_limit' in stats else None


def compiled(side, arguments):
  """(the compiled step, shapes of its results). The step takes the last one's results, whose memory it uses again."""
  results = jax.eval_shape(side.function, arguments)
  step = jax.jit(lambda spent, a: side.function(a), donate_argnums=0, keep_unused=True)
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='Some donated buffers')  # results that have no memory of their own shape
    return step.lower(results, arguments).compile(), results


def one_line(error):
  return f'{type(error).__name__}: {error}'.splitlines()[0][:160]


# ----------------------------------------------------------------------------------------------------------------------
# timing


class Runner(NamedTuple):
  """`turn(n)` queues n calls and returns the seconds that one took; `close()` gives the memory back."""

  turn: object
  close: object


def of_jax(step, results, arguments):
  """Calls behind each other on the device: each waits for the one whose memory it takes."""
  spent = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results)]
  jax.block_until_ready(spent)

  def turn(calls):
    now = spent.pop()
    began = time.perf_counter()
    for _ in range(calls):
      now = step(now, arguments)
    jax.block_until_ready(now)
    seconds = (time.perf_counter() - began) / calls
    spent.append(now)
    return seconds

  return Runner(turn, spent.clear)


def torch_side(side):
  return side.function is kernel_cases.flash_linear_attention


def with_torch(side, arguments):
  work: Torch = side.function(arguments)
  work.step()
  work.wait()
  return work.read()


def of_torch(side, arguments):
  work: Torch = side.function(arguments)

  def turn(calls):
    work.wait()
    began = time.perf_counter()
    for _ in range(calls):
      work.step()
    work.wait()
    return (time.perf_counter() - began) / calls

  return Runner(turn, lambda: None)


def rounds_of(runners, rounds, platform):
  """{name: seconds of one call, of every round}."""
  turns, longest = {}, 0
  for name, runner in runners.items():
    once = runner.turn(1)  # settles memory
    once = once if once > LONG_TURN else runner.turn(1)
    calls = max(1, round(TURN.get(platform, ACCELERATOR_TURN) / once))
    longest = max(longest, once * calls)
    turns[name] = lambda runner=runner, calls=calls: runner.turn(calls)
  return measuring.by_turns(turns, rounds if longest < LONG_TURN else min(rounds, 3))


def ceilings(o, rounds):
  """What this device reaches at most in this run: products in this dtype, and a stream read and written."""
  cpu = o.platform == 'cpu'
  n = 1024 if cpu else 8192
  size = 1 << (26 if cpu else 29)  # numbers: beyond every cache
  sides = {
      'product': (lambda a: a @ a, (n, n), n**-0.5),
      'stream': (lambda a: -a, (size,), 1.0),  # a plain copy would be optimised away
  }
  runners = {}
  for name, (function, shape, scale) in sides.items():
    case = kernel_cases.Case({'a': Drawn(shape, scale)}, None, [], None)
    side = kernel_cases.Side(name, lambda a, function=function: function(a['a']), 0, 0)
    step, results = compiled(side, abstract(case.arguments, o))
    runners[name] = of_jax(step, results, draw(case, o))
  seconds = rounds_of(runners, rounds, o.platform)
  for runner in runners.values():
    runner.close()
  return {
      'flops_per_second': measuring.spread([2 * n**3 / s for s in seconds['product']]),
      'bytes_per_second': measuring.spread([2 * size * o.dtype.itemsize / s for s in seconds['stream']]),
  }


def measure(kernel, shape, name, o, rounds, ceiling):
  """Figures of one implementation at one shape, beside its peers.

  Raises:
    Unfit: it does not serve the shape, or there is no memory for it.
  """
  case = KERNELS[kernel](o, shape)
  arguments = abstract(case.arguments, o)
  arguments |= jax.eval_shape(case.derived, arguments)
  sides = {name: case.ours(name)} | {peer.name: peer for peer in case.peers if peer.name != name}
  steps, left_out, room, needed = {}, [], free_bytes(jax.devices()[0]), 0
  for side in sides.values():
    try:
      if torch_side(side):
        continue
      step, results = compiled(side, arguments)
      memory = step.memory_analysis()
      extra = memory.temp_size_in_bytes + memory.output_size_in_bytes
      if room and memory.argument_size_in_bytes + extra > HEADROOM * room:
        total = (memory.argument_size_in_bytes + extra) / 2**30
        raise Unfit(f'does not fit: {total:,.1f} GiB of {room / 2**30:,.1f} GiB free')
      steps[side.name] = step, results
      needed = max(needed, memory.argument_size_in_bytes + memory.temp_size_in_bytes)
      needed += memory.output_size_in_bytes
    except Exception as error:  # a compiler's refusal has many types; one line is left of each
      reason = str(error) if isinstance(error, Unfit) else one_line(error)
      if side.name == name:
        raise Unfit(reason) from error
      left_out.append(f'{side.name}: {reason}')
  if room and needed > HEADROOM * room:
    raise Unfit(f'does not fit beside its peers: {needed / 2**30:,.1f} GiB of {room / 2**30:,.1f} GiB free')

  runners = {}
  try:
    arguments = draw(case, o)
    runners = {key: of_jax(*step, arguments) for key, step in steps.items()}
    runners |= {key: of_torch(side, arguments) for key, side in sides.items() if torch_side(side)}
    seconds = rounds_of(runners, rounds, o.platform)
  except RuntimeError as error:  # JaxRuntimeError and torch's OutOfMemoryError are such
    raise Unfit(one_line(error)) from error
  finally:
    for runner in runners.values():
      runner.close()
  figures = {'kernel': kernel, 'implementation': name, 'context': shape.context, 'queries': shape.queries, 'sides': {}}
  for key, values in seconds.items():
    figures['sides'][key] = rates(sides[key], measuring.spread(values), ceiling)
  peers = [key for key in seconds if key != name]
  if peers:
    figures['peer'] = min(peers, key=lambda key: figures['sides'][key]['seconds']['median'])
    figures['ratio'] = measuring.spread([y / x for x, y in zip(seconds[name], seconds[figures['peer']])])
  for key in seconds:
    show(figures, key, shape)
  for line in left_out:
    print(f'{"":16} peer left out: {line}', flush=True)
  return figures | {'peers_left_out': left_out}


def rates(side, seconds, ceiling):
  flops, moved = side.flops / seconds['median'], side.bytes / seconds['median']
  shares = flops / ceiling['flops_per_second']['median'], moved / ceiling['bytes_per_second']['median']
  return {'seconds': seconds, 'flops': side.flops, 'bytes': side.bytes, 'flops_per_second': flops,
          'bytes_per_second': moved, 'roofline_share': max(shares),
          'bound': 'products' if shares[0] > shares[1] else 'memory'}  # fmt: skip


def show(figures, key, shape):
  side = figures['sides'][key]
  low, middle, high = (1e3 * side['seconds'][name] for name in ('min', 'median', 'max'))
  ours = key == figures['implementation']
  if ours and 'ratio' in figures:
    ratio = figures['ratio']
    against = f'{ratio["median"]:.2f} ({ratio["min"]:.2f} to {ratio["max"]:.2f}) times as fast as {figures["peer"]}'
  else:
    against = 'no peer here' if ours else 'peer'
  print(f'{figures["kernel"]:16} {key:24} {shown(shape):>10} {f"{middle:.4g} ({low:.4g} to {high:.4g})":>32} '
        f'{side["flops_per_second"] / 1e12:9.4g} {side["bytes_per_second"] / 1e9:8.4g} '
        f'{side["roofline_share"]:9.1%}   {against}', flush=True)


if __name__ == '__main__':
  with command.errors_in_one_line():
    main(sys.argv[1:])
