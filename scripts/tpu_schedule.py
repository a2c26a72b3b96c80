"""What the TPU compiler's schedule says of our kernels, with no TPU: `pip install -e '.[aot]'`.

  python scripts/tpu_schedule.py --kernel=msa_attend_blocks --chip=v5p
  python scripts/tpu_schedule.py --prefill=131072 --prefill=1048576 --output=docs/results/tpu_schedule.json

Each kernel is compiled in a child process that has libtpu write its final schedule: bundles of instructions, one issued
a cycle at best, and the slots that each fills. Heads are MiniMax-M3's: 64 of queries, 4 of keys, dimensions of 128,
blocks of 128, k = 16, bfloat16, segments.

  bundles   of one step of the kernel's grid, or of a loop within it that has all matrix products: every branch, taken or
            not, but for loops inside, which are counted apart; of branches or loops with products the shortest alone.
  ideal     cycles of a step's matrix products at the peak of the chip: FLOPs / (2 * units * side**2).
  share     ideal / bundles, 1 at most: the greatest share of the matrix units' time that this schedule can fill.
  slots     of the matrix units that the compiler counts as taken, of all; also of vector units, loads and stores.
  cycles    bundles, and the waits where a unit is still at the product before, each taking ideal * units / products.
            The compiler puts products closer than units can take them; what else a chip waits for is not in it.
            'Most cycles' are those of the longest branch: of blocks with keys that a query does not see.

It ranks variants and bounds what a chip can do. It is no time measured: copies from memory that come late, for one, do
not show. Prefill adds up cycles times steps, and bytes at the chip's bandwidth where those take longer, of kernels and
of what XLA makes between them.
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

from mmx.kernels_pallas import api, attention_tpu, divergence_tpu, index_tpu, resident_tpu, sparse_pairs, sparse_tpu

H, K, D, DI, BLOCK, TOP_K = 64, 4, 128, 128, 128, 16
G = H // K
SPLASH = 1024  # queries and keys of a tile of splash, in halves of keys: the largest that v5p's VMEM holds
CHIPS = {'v5e': ('v5e:2x2', 'TPU v5 lite'), 'v5p': ('v5p:2x2x1', 'TPU v5p'), 'v6e': ('v6e:2x2', 'TPU v6 lite')}
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


TILES, BLOCKS, QUERIES = 2048, 1024, 1536


def keys():
  return sparse_pairs.Keys(*[array(BLOCKS, BLOCK, K * D)] * 2, integers(BLOCKS, 1, BLOCK), integers(1))


def plan(r):
  of_tiles, of_queries = [integers(TILES)] * 2 + [integers(TILES + 1)], [integers(QUERIES + 1)] * 2
  return resident_tpu.Plan(*of_tiles, integers(QUERIES * TOP_K + r), *of_queries, integers(BLOCKS), integers(3))


def attend(r, backward=False):
  """Of tiles of r queries."""
  all_queries, options = array(1, 2 * QUERIES, H, D), dict(K=K, scale=D**-0.5)
  if backward:
    stats, grown = [floats(1, 2 * QUERIES, H)] * 2, [floats(BLOCKS, BLOCK, K * D)] * 2
    call = lambda plan, grown, keys, rows, stats: sparse_tpu.attend_chunk_backward(
        (plan, r), grown, keys=keys, rows=rows, stats=stats, **options)
    return call, (plan(r), (all_queries, *grown), keys(), [all_queries] * 2, stats)
  call = lambda plan, out, keys, q: sparse_tpu.attend_chunk((plan, r), out, keys=keys, q_BTXD=q, **options)
  return call, (plan(r), all_queries, keys(), all_queries)


def diverge(r):
  all_queries, index_q, index_k = array(1, 2 * QUERIES, H, D), floats(QUERIES + 1, DI), array(BLOCKS, BLOCK, DI)
  carried = floats(1, 1, sparse_pairs.LANES), floats(BLOCKS, BLOCK, K * DI)
  logsumexps = floats(1, 2 * QUERIES, H), floats(1, 2 * QUERIES, K)
  call = lambda plan, *inputs: divergence_tpu.diverge((plan, r), *inputs, K, G, (D**-0.5, DI**-0.5))
  return call, (plan(r), carried, keys(), index_k, (all_queries, index_q), logsumexps)


def select(function=index_tpu.select_blocks_pallas):
  T, S = 1024, 2**17
  return lambda *a: function(*a, BLOCK, TOP_K), (array(1, T, K, DI), array(1, S, DI), integers(1, T), (integers(1, T), integers(1, S)))


def splash():
  sizes = splash_attention_kernel.BlockSizes(block_q=SPLASH, block_kv=SPLASH, block_kv_compute=SPLASH // 2)
  T = 8 * SPLASH

  def run(q, k, v, segments):
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * G)
    kernel = splash_attention_kernel.make_splash_mqa_single_device(mask, block_sizes=sizes)
    return jax.vmap(kernel, (0, 0, 0, None))(q, k, v, splash_attention_kernel.SegmentIds(segments, segments))

  return run, (array(K, G, T, D), array(K, T, D), array(K, T, D), integers(T))


def dense(name):
  """Full attention and its gradients."""
  T = 8192
  attend = functools.partial(api.attend, implementation=name, platform='tpu')
  call = jax.grad(lambda *a: jnp.sum(attend(*a).astype(jnp.float32)), (0, 1, 2))
  return call, (array(1, T, H, D), *[array(1, T, K, D)] * 2, integers(1, T))


def warm_up():
  T = 8192
  call = functools.partial(api.msa_prefix_kl, implementation='auto', platform='tpu')
  return call, (array(1, T, H, D), array(1, T, K, D), array(1, T, K, DI), array(1, T, DI), integers(1, T))


def attend_cache(T):
  return attention_tpu.attention_cached_pallas, (array(1, T, H, D), *[array(1, K, 2**17, D)] * 2, integers(1, T))


select_and_sum = functools.partial(select, index_tpu.select_blocks_and_sum)

KERNELS = {  # name: (what makes function and arguments, the name it compiles to, a step, multiplications of a step)
    'msa_attend_blocks_backward': (
        functools.partial(attend, 32, True), 'msa_attend_blocks_backward', '32 queries, a block', 5 * 512 * BLOCK * D),
    'msa_divergence': (
        functools.partial(diverge, 32), 'msa_divergence', '32 queries, a block',
        32 * G * BLOCK * D + 3 * 32 * BLOCK * DI),
    'msa_index_scores': (
        select, 'msa_index_scores', f'{index_tpu.ROWS} rows of queries, {index_tpu.KEYS} keys',
        index_tpu.ROWS * index_tpu.KEYS * DI),
    'msa_index_largest': (select, 'msa_index_largest', '128 rows of queries', 0),
    'msa_index_scores_and_sums': (  # in training
        select_and_sum, 'msa_index_scores', f'{index_tpu.ROWS} rows of queries, {index_tpu.KEYS} keys',
        index_tpu.ROWS * index_tpu.KEYS * DI),
    'msa_index_logsumexp': (select_and_sum, 'msa_index_logsumexp', '128 rows of queries', 0),
    'attend': (  # full attention, in tiles that all queries of a step see whole
        functools.partial(attend_cache, 256), 'attend', '64 queries, 512 keys', 2 * 64 * G * 512 * D),
    'attend_1': (functools.partial(attend_cache, 1), 'attend', 'a query, 2048 keys', 2 * G * 2048 * D),
    'attend_backward': (
        functools.partial(dense, 'pallas'), 'attend_backward', '64 queries, 512 keys', 5 * 64 * G * 512 * D),
    'msa_warmup_divergence': (
        warm_up, 'msa_warmup_divergence', '128 queries, 256 keys', 128 * 256 * (G * D + 3 * DI)),
    'splash_dq': (
        functools.partial(dense, 'splash'), 'splash_mha_dq', '512 queries of a head, 512 keys', 3 * 512 * 512 * D),
    'splash_dkv': (
        functools.partial(dense, 'splash'), 'splash_mha_dkv', '512 queries of a head, 512 keys', 4 * 512 * 512 * D),
    'splash': (splash, 'splash', f'{SPLASH} queries, {SPLASH} keys', 2 * SPLASH * SPLASH * D),
}
for r in (1, 2, 4, 8, 16, 32):  # queries that share a block
  W = sparse_tpu.tiles_of_a_step(r, BLOCK * D * 2)
  KERNELS['msa_attend_blocks' if r == 32 else f'msa_attend_blocks_{r}'] = (
      functools.partial(attend, r), 'msa_attend_blocks', f'{W} of {r} queries, a block each', W * 2 * r * G * BLOCK * D)

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
  found, _ = schedule_files(make, chip)
  every, (capacity, taken_of_bundle) = found[next(name for name in found if re.match(rf'(transpose_|jvp_)*{file}', name))]
  side, units = info(chip).mxu_column_size, info(chip).num_mxus
  ideal = products / (units * side**2)
  reports = []
  for here in ways(every):
    taken = {unit: int(column[here].sum()) for unit, column in taken_of_bundle.items()}
    calls = [re.findall(r'vmatmul\S*\.mxu(\d)', every[i][1]) for i in here]
    named = dict(MXU='matrix', VALU='vector', XLU='across lanes', VLOAD='load', VSTORE='store', SALU='scalar')
    reports.append({
        'bundles': len(here), 'ideal': round(ideal), 'cycles': cycles(calls, ideal * units),
        'share': min(1, ideal / len(here)),
        'slots': {name: taken[unit] / (capacity[unit] * len(here)) for unit, name in named.items()},
        'spills': taken['VSTORE:SPILL'], 'fills': taken['VLOAD:FILL'],
    })
  loops = np.bincount([loop for loop, _ in every])[1:].tolist()
  best, *_, worst = sorted(reports, key=lambda report: report['bundles']) * 2
  return {'chip': chip, 'kernel': kernel, 'step': step, **best, 'most cycles': worst['cycles'], 'loops': loops}


def ways(every):
  """The bundles of a step, as indices, once for each branch that has matrix products: one of those is taken. If they are
  all in loops within it, a step is one round of such a loop, and each is a way.
  """
  loops = collections.defaultdict(list)
  for i, (loop, _) in enumerate(every):
    loops[loop].append(i)
  step = loops[1]
  multiplies = lambda here: any('vmatmul' in every[i][1] for i in here)
  inner = [np.array(here) for here in loops.values() if multiplies(here)]
  if inner and not multiplies(step):
    return inner
  starts = {int(region): i for i, (_, text) in enumerate(every)
            for region in re.findall(r'Start(?:/End empty)? region (\d+)', text)}
  branches = []
  for i in step:
    target = re.search(r'sbr\.rel \(%\S+\) target = \$region(\d+)', every[i][1])
    body = range(i + 1, starts.get(int(target[1]), 0)) if target else ()
    if multiplies(body):
      branches.append(set(body))
  branches = [branch for branch in branches if not any(inner < branch for inner in branches)]
  others = [set().union(*branches) - branch for branch in branches] or [set()]
  return [np.array([i for i in step if i not in left_out]) for left_out in others]


def cycles(calls, all_holds):
  """Of bundles that call matrix units by number, all of whose products take `all_holds` cycles of a unit."""
  hold = all_holds / max(1, sum(map(len, calls)))
  now, free = 0, collections.Counter()
  for units_here in calls:
    now = max([now, *(free[unit] for unit in units_here)])
    free.update({unit: now + hold - free[unit] for unit in units_here})
    now += 1
  return math.ceil(max([now, *free.values()]))


@functools.cache
def schedule_files(make, chip):
  """Compiles in a process of its own: ({kernel: (bundles, (capacity, taken))}, the program as text); bundles as
  `read_bundles` has them.
  """
  with tempfile.TemporaryDirectory() as folder:
    fresh = multiprocessing.get_context('spawn')  # libtpu reads its flags once, as it is loaded
    with concurrent.futures.ProcessPoolExecutor(1, fresh) as pool:
      text = pool.submit(compile_, make, chip, folder).result()
    found = {}
    for path in sorted(pathlib.Path(folder).glob('*-final_bundles.txt')):
      match = re.fullmatch(r'(\d+)-(.+?)(\.\d+)?-\d+-final_bundles.txt', path.name)
      slots = list(path.parent.glob(f'{match[1]}-*-final_hlo-static-per-bundle-utilization.txt')) if match else []
      if slots:
        found[match[2]] = read_bundles(path.read_text()), read_slots(slots[0].read_text())
    return found, text


def compile_(make, chip, folder):
  """In the child: compiles for a chip that is not here, and has libtpu dump what it makes."""
  os.environ.update(HERE, LIBTPU_INIT_ARGS=f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true')
  function, arguments = make()
  topology = topologies.get_topology_desc(platform='tpu', topology_name=CHIPS[chip][0])
  mesh = jax.sharding.Mesh(topology.devices[:1], ('chip',))
  here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(function).trace(*placed).lower(lowering_platforms=('tpu',)).compile().as_text()


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
  """(slots of a bundle, slots taken in each) by unit."""
  lines = [line for line in text.splitlines() if line.strip()]
  units = lines[1].replace(',', ' ').split()
  taken = np.array([list(map(int, line.split())) for line in lines[4:]])
  return dict(zip(units, map(int, lines[2].split()))), dict(zip(units, taken.T))


def info(chip):
  return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(chip), 1)


# ----------------------------------------------------------------------------------------------------------------------
# prefill


def prefill(tokens, chip):
  """Cycles of one layer's attention over a prompt, by part, and its ratios to dense causal attention: a dict.

  `dense` is causal attention at the peak of the chip, which nothing reaches; `splash` its kernel's cycles for the tiles
  that are not above the diagonal, `attend` those of our own. Each query's blocks are drawn at random among those it
  sees, so that queries share few.
  """
  peak = 2 * info(chip).num_mxus * info(chip).mxu_column_size**2
  bytes_a_cycle = info(chip).mem_bw_bytes_per_second * peak / info(chip).bf16_ops_per_second
  parts = {
      'index scores': index_scores(tokens, chip), 'largest blocks': largest_blocks(tokens, chip),
      'pairs sorted': sorting(tokens, chip), 'blocks': blocks(tokens, chip),
  }
  parts = {name: {'cycles': round(cycles), 'copies': round(size / bytes_a_cycle)}
           for name, (cycles, size) in parts.items()}
  total = sum(max(part.values()) for part in parts.values())
  dense = 2 * tokens**2 * H * D / peak
  tiles = tokens // SPLASH
  splash_cycles = H * tiles * (tiles + 1) // 2 * schedule('splash', chip)['cycles']
  met = K * sum(-(-64 * i // 512) for i in range(1, tokens // 64 + 1))
  attend_cycles = met * schedule('attend', chip)['cycles']
  c, r = chunk(tokens, chip)
  return {
      'chip': chip, 'tokens': tokens, 'parts': parts, 'msa': total, 'dense': round(dense), 'splash': int(splash_cycles),
      'attend': attend_cycles, 'dense / msa': dense / total,
      'splash / msa': splash_cycles / total, 'attend / msa': attend_cycles / total,
      'queries of a chunk': c, 'queries of a tile': r,
  }


def index_scores(tokens, chip):
  """Steps, of which the last of a tile of queries masks keys."""
  ends = np.arange(1, tokens * K // index_tpu.ROWS + 1) * (index_tpu.ROWS // K)
  steps, report = np.sum(-(-ends // index_tpu.KEYS)), schedule('msa_index_scores', chip)
  pooled = 4 * index_tpu.ROWS * index_tpu.KEYS // BLOCK
  cycles = (steps - ends.size) * report['cycles'] + ends.size * report['most cycles']
  return cycles, steps * (index_tpu.KEYS * DI * 2 + pooled)


def largest_blocks(tokens, chip):
  """A step loads its strips, then goes through them once for each of the k blocks."""
  step, load, turn, strip = schedule('msa_index_largest', chip)['loops']
  queries = index_tpu.LANES // K
  strips = -(-np.arange(queries, tokens + 1, queries) // (BLOCK * index_tpu.STRIP))
  cycles = np.sum(step + strips * load + TOP_K * (turn + strips * strip))
  return cycles, 4 * tokens * K * -(-tokens // BLOCK)


def sorting(tokens, chip):
  """XLA's part, from a chunk's choices to tiles: what libtpu states for each instruction, and two sorts of each head's
  pairs, whose bundles have no loop if they are one head's.
  """
  c, _ = chunk(tokens, chip)
  _, text = schedule_files(functools.partial(sorted_pairs, tokens, c), chip)
  stated = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
  found, _ = schedule_files(functools.partial(one_sort, c * TOP_K), chip)
  (sort,) = (bundles for name, (bundles, _) in found.items() if name.startswith('sort'))
  return -(-tokens // c) * (stated + 2 * K * len(sort)), 0


def one_sort(pairs):
  return functools.partial(jax.lax.sort, is_stable=False), (integers(pairs),)


def sorted_pairs(tokens, c):
  queries = resident_tpu.Queries(integers(1, c, K, TOP_K), integers(1, c), integers(1, c))
  P = -(-tokens // BLOCK)
  keys = sparse_pairs.Keys(*[array(P, BLOCK, K * D)] * 2, integers(P, 1, BLOCK), integers(1))
  plans = lambda queries, keys, start: resident_tpu.plans(queries, keys, start, 1, resident_tpu.TILE_ROWS // G)[0]
  return plans, (queries, keys, integers())


def blocks(tokens, chip):
  """Steps, of which the last of a chunk and kv head mask keys; and what its first and its last do for each 128 rows."""
  c, r = chunk(tokens, chip)
  report = schedule('msa_attend_blocks' if r == 32 else f'msa_attend_blocks_{r}', chip)
  W = sparse_tpu.tiles_of_a_step(r, BLOCK * D * 2)
  sampled = np.array([tiles_of(end, c, r) for end in np.linspace(c, tokens, SAMPLES).astype(int)])
  whole, steps = sampled[:, 0] // W, -(-sampled.sum(axis=1) // W)
  calls = -(-tokens // c) * K
  around = -(-(c + 1) * G // sparse_pairs.LANES) * sum(report['loops'][-2:])
  one = np.mean(whole * report['cycles'] + (steps - whole) * report['most cycles']) + around
  return calls * one, 2 * calls * np.mean(sampled.sum(axis=1)) * 2 * BLOCK * D + 2 * 2 * tokens * H * D


def tiles_of(end, c, r):
  """Tiles of one kv head of the c queries before `end`: each chose its own block and others before it at random. Those
  of blocks before the chunk, and the others.
  """
  rng = np.random.default_rng(end)
  own = np.arange(end - c, end) // BLOCK
  others = (rng.random((c, TOP_K - 1)) * own[:, None]).astype(int)
  shared = np.bincount(np.concatenate([own, others[own >= TOP_K].ravel()]))
  tiles, before = -(-shared // r), (end - c + 1) // BLOCK
  return np.sum(tiles[:before]), np.sum(tiles[before:])


@functools.cache
def chunk(tokens, chip):
  """(queries of a chunk, queries of a tile)."""
  device = jax.sharding.AbstractDevice(CHIPS[chip][1], 1, 'tpu')
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ('chip',), abstract_device=device)):
    c = resident_tpu.chunk_length(array(1, tokens, H, D), array(1, tokens, K, D), TOP_K, BLOCK)
  plan = functools.partial(sparse_pairs.plan, P=-(-tokens // BLOCK), least=1, most=resident_tpu.TILE_ROWS // G)
  tiles = jax.eval_shape(plan, integers(1, c, 1, TOP_K), integers(1, c))
  return c, tiles.query_Mr.shape[1]


if __name__ == '__main__':
  app.run(main)
