"""What the TPU compiler's schedule says of our kernels, with no TPU: `pip install -e '.[aot]'`.

  python scripts/tpu_schedule.py --kernel=msa_attend_blocks --chip=v5p
  python scripts/tpu_schedule.py --prefill=131072 --prefill=1048576 --output=docs/results/tpu_schedule.json

Each kernel is compiled in a child process that has libtpu write its final schedule: bundles of instructions, one issued
a cycle at best, and the slots that each fills. Heads are MiniMax-M3's: 64 of queries, 4 of keys, dimensions of 128,
blocks of 128, k = 16, bfloat16, segments.

  bundles   of the whole kernel for one step of its grid: every branch, taken or not, and what stands before and after
            the loop over the grid. Loops inside a step are counted once.
  ideal     cycles of a step's matrix products at the peak of the chip: FLOPs / (2 * units * side**2).
  share     ideal / bundles: the greatest share of the matrix units' time that this schedule can fill.
  slots     of the matrix units that the compiler counts as taken, of all; also of vector units, loads and stores.
  cycles    bundles, and the waits where a unit is still at the product before, each taking ideal * units / products.
            The compiler puts products closer than units can take them; what else a chip waits for is not in it.

It ranks variants and bounds what a chip can do. It is no time measured: copies from memory that come late, for one, do
not show. Prefill adds up cycles times steps, and bytes at the chip's bandwidth where those take longer.
"""

import collections
import concurrent.futures
import datetime
import functools
import json
import math
import multiprocessing
import os
import pathlib
import re
import tempfile
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from mmx.kernels_pallas import divergence_tpu, index_tpu, sparse_pairs, sparse_tpu

H, K, D, DI, BLOCK, TOP_K = 64, 4, 128, 128, 128, 16
G = H // K
SPLASH = 1024  # queries and keys of a tile of splash, in halves of keys: the largest that v5p's VMEM holds
CHIPS = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}
HERE = {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-4', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_MIN_LOG_LEVEL': '3',
        'TPU_STDERR_LOG_LEVEL': '3'}  # no chip and no metadata server is asked
SAMPLES = 16  # chunks of a prompt whose tiles are counted


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}; every option starts with --')
  for name, value in HERE.items():
    os.environ.setdefault(name, value)  # of the child processes
  jax.config.update('jax_platforms', 'cpu')
  result = {
      'date': datetime.date.today().isoformat(),
      'versions': {name: metadata.version(name) for name in ('jax', 'jaxlib', 'libtpu')},
      'kernels': [], 'prefill': [],
  }
  for chip in CHIP.value:
    for kernel in KERNEL.value:
      report = schedule(kernel, chip)
      result['kernels'].append(report)
      print(line(report), flush=True)
    for tokens in PREFILL.value:
      result['prefill'].append(prefill(tokens, chip))
      print(json.dumps(result['prefill'][-1], indent=2), flush=True)
  if OUTPUT.value:
    pathlib.Path(OUTPUT.value).write_text(json.dumps(result, indent=2) + '\n')


def line(report):
  counts = ', '.join(f'{name} {share:.0%}' for name, share in report['slots'].items())
  share = f', {report["ideal"]} ideal: at most {report["share"]:.0%}' if report['ideal'] else ''
  head = f'{report["chip"]} {report["kernel"]} ({report["step"]}): {report["bundles"]} bundles'
  return (f'{head}, {report["cycles"]} cycles'
          f'{share}; {counts}; {report["spills"]} spills, {report["fills"]} fills')


# ----------------------------------------------------------------------------------------------------------------------
# kernels


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


integers = functools.partial(array, dtype=jnp.int32)
floats = functools.partial(array, dtype=jnp.float32)


def sides():
  """A plan of tiles, and keys, for kernels that go through pairs; most tiles, and blocks."""
  M, blocks = 2048, 1024
  tiles = sparse_pairs.Tiles(integers(M), integers(), None, None, None)
  keys = sparse_pairs.Keys(*[array(blocks, BLOCK, K * D)] * 2, integers(blocks, 1, BLOCK), integers(1))
  return tiles, keys, M, blocks


def attend(rows, backward=False):
  tiles, keys, M, blocks = sides()
  kernels = sparse_tpu.kernels()
  tile, lanes, grown = array(M, rows, D), integers(M, 2, rows), (floats(blocks, BLOCK, K * D),) * 2
  scales = dict(K=K, scale=D**-0.5)
  if backward:
    arguments = tiles, keys, tile, tile, lanes, floats(M, 2, rows), grown
    return functools.partial(kernels.backward, **scales), arguments
  return functools.partial(kernels.forward, **scales), (tiles, keys, tile, lanes)


def diverge(rows, stats=False):
  tiles, keys, M, blocks = sides()
  r, kernels = rows // G, divergence_tpu.kernels()
  index_k, index_q, who = array(blocks, BLOCK, DI), array(M, r, DI), integers(M, 2, r)
  if stats:
    return functools.partial(kernels.stats, K=K, scale=DI**-0.5), (tiles, keys, index_k, index_q, who)
  logsumexps, grown = (floats(M, rows), floats(M, r)), floats(blocks, BLOCK, K * DI)
  arguments = tiles, keys, index_k, array(M, rows, D), index_q, who, logsumexps, grown
  return functools.partial(kernels.diverge, K=K, scales=(D**-0.5, DI**-0.5)), arguments


def select():
  T, S = 1024, 2**17
  select_ = lambda *a: index_tpu.select_blocks_pallas(*a, BLOCK, TOP_K)
  return select_, (array(1, T, K, DI), array(1, S, DI), integers(1, T), (integers(1, T), integers(1, S)))


def splash():
  sizes = splash_attention_kernel.BlockSizes(block_q=SPLASH, block_kv=SPLASH, block_kv_compute=SPLASH // 2)
  T = 8 * SPLASH

  def run(q, k, v, segments):
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * G)
    kernel = splash_attention_kernel.make_splash_mqa_single_device(mask, block_sizes=sizes)
    return jax.vmap(kernel, (0, 0, 0, None))(q, k, v, splash_attention_kernel.SegmentIds(segments, segments))

  return run, (array(K, G, T, D), array(K, T, D), array(K, T, D), integers(T))


KERNELS = {  # name: (what makes function and arguments, the name it compiles to, a step, multiplications of a step)
    'msa_attend_blocks': (
        functools.partial(attend, 512), 'msa_attend_blocks', f'{sparse_tpu.TILES} of 512 rows of queries, a block each',
        sparse_tpu.TILES * 2 * 512 * BLOCK * D),
    'msa_attend_blocks_backward': (
        functools.partial(attend, 512, True), 'msa_attend_blocks_backward', '512 rows of queries, a block',
        5 * 512 * BLOCK * D),
    'msa_index_stats': (
        functools.partial(diverge, 512, True), 'msa_index_stats',
        f'{sparse_tpu.TILES} of {512 // G} queries, a block each', sparse_tpu.TILES * 512 // G * BLOCK * DI),
    'msa_divergence': (
        functools.partial(diverge, 512), 'msa_divergence', f'512 rows of queries, {512 // G} of index queries, a block',
        512 * BLOCK * D + 3 * 512 // G * BLOCK * DI),
    'msa_index_scores': (
        select, 'msa_index_scores', f'{index_tpu.ROWS} rows of queries, {index_tpu.KEYS} keys',
        index_tpu.ROWS * index_tpu.KEYS * DI),
    'msa_index_largest': (select, 'msa_index_largest', '128 rows of queries', 0),
    'splash': (splash, 'splash', f'{SPLASH} queries, {SPLASH} keys', 2 * SPLASH * SPLASH * D),
}
for rows in (16, 32, 64, 128, 256):  # tiles where fewer queries share a block
  KERNELS[f'msa_attend_blocks_{rows}'] = (
      functools.partial(attend, rows), 'msa_attend_blocks', f'{sparse_tpu.TILES} of {rows} rows of queries, a block each',
      sparse_tpu.TILES * 2 * rows * BLOCK * D)

ALL = [name for name in KERNELS if not re.search(r'\d', name)]
KERNEL = flags.DEFINE_multi_enum('kernel', ALL, list(KERNELS), 'Which kernel; repeat it for several.')
CHIP = flags.DEFINE_multi_enum('chip', list(CHIPS), list(CHIPS), 'Which chip; repeat it for several.')
PREFILL = flags.DEFINE_multi_integer('prefill', [], 'Tokens of a prompt whose attention is added up.', SPLASH)
OUTPUT = flags.DEFINE_string('output', None, 'JSON file for the figures; none is written if left out.')


# ----------------------------------------------------------------------------------------------------------------------
# schedules


@functools.cache
def schedule(kernel, chip):
  """The figures of a kernel's schedule, as the docstring of this file defines them: a dict."""
  make, file, step, products = KERNELS[kernel]
  found = schedule_files(make, chip)
  bundles, (capacity, taken) = found[next(name for name in found if name.startswith(file))]
  side, units = info(chip).mxu_column_size, info(chip).num_mxus
  ideal = products / (units * side**2)
  calls = [re.findall(r'vmatmul\S*\.mxu(\d)', text) for _, text in bundles]
  hold = ideal * units / max(1, sum(map(len, calls)))
  now, free = 0, collections.Counter()
  for units_here in calls:
    now = max([now, *(free[unit] for unit in units_here)])
    free.update({unit: now + hold - free[unit] for unit in units_here})
    now += 1
  named = dict(MXU='matrix', VALU='vector', XLU='across lanes', VLOAD='load', VSTORE='store', SALU='scalar')
  return {
      'chip': chip, 'kernel': kernel, 'step': step, 'bundles': len(bundles), 'ideal': round(ideal),
      'cycles': math.ceil(max([now, *free.values()])), 'share': ideal / len(bundles),
      'slots': {name: taken[unit] / (capacity[unit] * len(bundles)) for unit, name in named.items()},
      'spills': taken['VSTORE:SPILL'], 'fills': taken['VLOAD:FILL'],
      'loops': [own for _, own in sorted(collections.Counter(loop for loop, _ in bundles if loop).items())],
  }


@functools.cache
def schedule_files(make, chip):
  """Compiles in a process of its own: {kernel: (bundles, (capacity, taken))}; bundles as `read_bundles` has them."""
  with tempfile.TemporaryDirectory() as folder:
    fresh = multiprocessing.get_context('spawn')  # libtpu reads its flags once, as it is loaded
    with concurrent.futures.ProcessPoolExecutor(1, fresh) as pool:
      pool.submit(compile_, make, chip, folder).result()
    found = {}
    for path in sorted(pathlib.Path(folder).glob('*-final_bundles.txt')):
      match = re.fullmatch(r'(\d+)-(.+?)(\.\d+)?-\d+-final_bundles.txt', path.name)
      slots = list(path.parent.glob(f'{match[1]}-*-final_hlo-static-per-bundle-utilization.txt')) if match else []
      if slots:
        found[match[2]] = read_bundles(path.read_text()), read_slots(slots[0].read_text())
    return found


def compile_(make, chip, folder):
  """In the child: compiles for a chip that is not here, and has libtpu dump what it makes."""
  os.environ.update(HERE, LIBTPU_INIT_ARGS=f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true')
  function, arguments = make()
  topology = topologies.get_topology_desc(platform='tpu', topology_name=CHIPS[chip])
  mesh = jax.sharding.Mesh(topology.devices[:1], ('chip',))
  here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    jax.jit(function).trace(*placed).lower(lowering_platforms=('tpu',)).compile()


def read_bundles(text):
  """[(number of the innermost loop, 0 for none; the instructions)], in order: a loop ends where it falls through."""
  bundles, loops, inside = [], 0, [(0, 0)]
  for mark, depth, instructions in re.findall(r'^ *(?:0x[0-9a-f]+|0) +([A-Z]{2})?: ?([> ]*)(\{.*)$', text, re.M):
    depth = depth.count('>')
    if mark == 'LB':
      loops += 1
      inside.append((depth, loops))
    while mark == 'PF' and depth < inside[-1][0]:
      inside.pop()
    bundles.append((inside[-1][1], instructions))
  return bundles


def read_slots(text):
  """(slots of a bundle, slots taken in all) by unit."""
  lines = [line for line in text.splitlines() if line.strip()]
  units = lines[1].replace(',', ' ').split()
  taken = np.array([list(map(int, line.split())) for line in lines[4:]]).sum(axis=0)
  return dict(zip(units, map(int, lines[2].split()))), dict(zip(units, map(int, taken)))


def info(chip):
  return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(chip), 1)


# ----------------------------------------------------------------------------------------------------------------------
# prefill


def prefill(tokens, chip):
  """Cycles of one layer's attention over a prompt, by part, and its ratios to dense causal attention: a dict.

  `dense` is causal attention at the peak of the chip, which nothing reaches; `splash` its kernel's cycles for the tiles
  that are not above the diagonal. Each query's blocks are drawn at random among those it sees, so that queries share
  few.
  """
  peak = 2 * info(chip).num_mxus * info(chip).mxu_column_size**2
  bytes_a_cycle = info(chip).mem_bw_bytes_per_second * peak / info(chip).bf16_ops_per_second
  parts = {
      'index scores': index_scores(tokens, chip), 'largest blocks': largest_blocks(tokens, chip),
      'blocks': blocks(tokens, chip), 'gathers and sums': (0, moved_around(tokens)),
  }
  parts = {name: {'cycles': round(cycles), 'copies': round(size / bytes_a_cycle)}
           for name, (cycles, size) in parts.items()}
  total = sum(max(part.values()) for part in parts.values())
  dense = 2 * tokens**2 * H * D / peak
  tiles = tokens // SPLASH
  splash_cycles = H * tiles * (tiles + 1) // 2 * schedule('splash', chip)['cycles']
  c, r, memory = chunk(tokens)
  return {
      'chip': chip, 'tokens': tokens, 'parts': parts, 'msa': total, 'dense': round(dense), 'splash': int(splash_cycles),
      'dense / msa': dense / total, 'splash / msa': splash_cycles / total,
      'queries of a chunk': c, 'queries of a tile': r, 'rows held, MiB': memory / 2**20,
  }


def index_scores(tokens, chip):
  ends = np.arange(1, tokens * K // index_tpu.ROWS + 1) * (index_tpu.ROWS // K)
  steps = np.sum(-(-ends // index_tpu.KEYS))
  pooled = 4 * index_tpu.ROWS * index_tpu.KEYS // BLOCK
  return steps * schedule('msa_index_scores', chip)['cycles'], steps * (index_tpu.KEYS * DI * 2 + pooled)


def largest_blocks(tokens, chip):
  """A step loads its strips, then goes through them once for each of the k blocks."""
  step, load, turn, strip = schedule('msa_index_largest', chip)['loops']
  queries = index_tpu.LANES // K
  strips = -(-np.arange(queries, tokens + 1, queries) // (BLOCK * index_tpu.STRIP))
  cycles = np.sum(step + strips * load + TOP_K * (turn + strips * strip))
  return cycles, 4 * tokens * K * -(-tokens // BLOCK)


def blocks(tokens, chip):
  c, r, _ = chunk(tokens)
  name = 'msa_attend_blocks' if r * G == sparse_tpu.TILE_ROWS else f'msa_attend_blocks_{r * G}'
  sampled = np.linspace(c, tokens, SAMPLES).astype(int)
  tiles = np.mean([tiles_of(end, c, r) for end in sampled]) * tokens / c * K
  return tiles * schedule(name, chip)['cycles'] / sparse_tpu.TILES, 2 * tiles * 2 * (r * G + BLOCK) * D


def tiles_of(end, c, r):
  """Tiles of one kv head of the c queries before `end`: each chose its own block and others before it at random."""
  rng = np.random.default_rng(end)
  own = np.arange(end - c, end) // BLOCK
  others = (rng.random((c, TOP_K - 1)) * own[:, None]).astype(int)
  shared = np.bincount(np.concatenate([own, others[own >= TOP_K].ravel()]))
  return np.sum(-(-shared // r))


def moved_around(tokens):
  """Bytes of pairs' rows outside the kernel: queries read and written; outputs read, written in order and read again;
  the sum in float32 read and written by some choices at once."""
  return tokens * K * TOP_K * G * D * (5 * 2 + 2 * 4 / sparse_pairs.SUM_AT_ONCE)


def chunk(tokens):
  """(queries of a chunk, queries of a tile, bytes of its rows of queries and outputs at most)."""
  inputs = array(1, tokens, H, D), *[array(1, tokens, K, D)] * 2, integers(1, tokens, K, TOP_K), integers(1, tokens)
  sides = functools.partial(sparse_pairs.sides, segments=None, b=BLOCK, one_head=True)
  queries, keys = jax.eval_shape(sides, *inputs)
  one_chunk = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), queries)
  plan = lambda queries, keys: sparse_pairs.plan(sparse_pairs.of_head(queries, 0, K), keys, sparse_tpu.TILE_ROWS)
  tiles = jax.eval_shape(plan, one_chunk, keys)
  M, r = tiles.query_Mr.shape
  return queries.q_BcHD.shape[2], r, 2 * 2 * M * r * G * D


if __name__ == '__main__':
  app.run(main)
