"""docs/kernels.md and its figure, from docs/results/kernels_*.json and from what the repository proves of each kernel.

  python scripts/plot_kernels.py

Run it again when `bench_kernels.py` has written figures of another device; nothing on the page is written by hand.
"""

import ast
import io
import json
import pathlib
import re
import sys

import jax.numpy as jnp
import kernel_cases
from bench_kernels import shown
from kernel_cases import Options, Shape
from measuring import BUSY

from mmx import command, config, flops
from mmx.report import COLOURS

ROOT = pathlib.Path(__file__).parents[1]
M3 = Options('gpu', jnp.dtype('bfloat16'), (64, 4, 128, 128), 128, 16, (3072, 1536, 256, 8))
CONTEXTS = [1 << n for n in range(13, 21)]
PUBLISHED = {'msa_prefill': 14.2, 'msa_decode': 7.6}  # at 2^20 tokens on an H800: MSA, abstract and figure 4
TITLES = {'msa_prefill': 'Prefill', 'msa_decode': 'Decode, one token'}
CHIPS = {'tpu': 'TPU', 'gpu': 'Hopper'}
FIXTURES = {'tpu': {'compile_for_tpu': 'v5e, v5p, v6e'}, 'gpu': {'compile_for_hopper': 'sm_90a'}}
# Which kernel of `bench_kernels.py` runs a file's kernel: by the first word of the file's name.
MEASURED_BY = {'attention': 'attention', 'lightning': 'lightning', 'grouped': 'experts', 'index': 'index',
               'decode': 'msa_decode', 'divergence': 'msa_train'}  # fmt: skip

PAGE = """# Kernels: what each is, what it has passed, how fast it is

Written by `python scripts/plot_kernels.py`; run it again after `python scripts/bench_kernels.py
--output=docs/results/kernels_DEVICE.json` on another device.

## Speed-up over full attention

![Speed-up of MSA over full attention against context](results/kernels.png)

MiniMax-M3's heads: 64 queries and 4 keys of 128, index keys of 128, blocks of 128, 16 blocks a query. A speed-up is
against the fastest dense form of the same device in the same run, median of the rounds, bars from the lowest to the
highest.

- **FLOP ratio**: the cost model of the MSA paper (arXiv:2606.13392, section 3.1) for a whole causal prompt: at 1M
  tokens {flop_1m:.1f}, at 8k {flop_8k:.1f}. The index branch scores every key before it, so the ratio ends at 32.
- **Byte ratio**: what one decoded token must read. Full attention reads all keys and values, MSA all index keys and 16
  blocks of each key head: {byte_1m:.1f} at 1M, with index keys in float8 {byte_1m_float8:.1f}. A device whose decoding
  is bound by memory cannot exceed it, unless its dense form is further from that bound than MSA is, as on the CPU below.
- Up to k·b = 2,048 tokens MSA sees what full attention sees, and scores it besides: nothing is to be gained there.
- **Published**: 14.2 for prefill and 7.6 for decoding at 1M on an H800 (the paper's abstract and figure 4).
- On a CPU full attention over a whole long prompt would take hours: the last {tail} queries of the prompt stand for it.
  They see more than the mean query, so their FLOP ratio is higher (dotted). Full attention against a cache is `spans`
  there, over a whole row `chunked`.

{measured}
## What each kernel has passed

Each row is a file of `mmx/kernels_pallas/`. *Interpreted*: its tests hold it against the oracle in values and gradients
on a CPU. *Simulated*: with race detection, for kernels that copy by hand. *Compiled for*: the machine code of those
chips is made at production shapes, without the chip (`pytest -m aot`). *Run on*: `bench_kernels.py` has checked its
numerics there.

{kernels}

## What bounds what

Counted is what the algorithm asks for, wherever a kernel does more: `scripts/kernel_cases.py`.

{work}
"""


def main():
  results = {path: json.loads(path.read_text()) for path in sorted((ROOT / 'docs/results').glob('kernels_*.json'))}
  (ROOT / 'docs/results/kernels.png').write_bytes(figure(list(results.values())))
  (ROOT / 'docs/kernels.md').write_text(page(results))


# ----------------------------------------------------------------------------------------------------------------------
# limits


def flop_ratio(context) -> float:
  """F_GQA / F_MSA of a causal prompt (MSA, section 3.1)."""
  H, K, Dh, Di = M3.heads
  sizes = {'attention.num_heads': H, 'attention.num_kv_heads': K, 'attention.head_dim': Dh, 'msa.index_dim': Di,
           'msa.block_size': M3.block, 'msa.top_k': M3.top_k}  # fmt: skip
  model = config.override(config.Experiment(), {f'model.{name}': size for name, size in sizes.items()}).model
  return flops.mixing_flops(model, 'full', context) / flops.mixing_flops(model, 'msa', context)


def work_ratios(context, queries, o=M3) -> tuple[float, float]:
  """(FLOPs, bytes) of full attention over those of MSA, for the last queries of a context."""
  shape = Shape(context, queries)
  full, msa = kernel_cases.attention_work(o, shape), kernel_cases.msa_work(o, shape)
  return full[0] / msa[0], full[1] / msa[1]


def tails(results) -> list[int]:
  """How many queries stood for a prompt, where not all were computed."""
  return sorted({case['queries'] for result in results for case in result['cases']
                 if case['kernel'] == 'msa_prefill' and case['queries'] < case['context']})  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# figure


def label(result) -> str:
  name = f'CPU, {result["cores"]} cores' if result['device'] == 'cpu' else result['device_kind']
  index = result.get('index_dtype', result['dtype'])
  return f'{name}, {result["dtype"]}' + (f', index heads in {index}' if index != result['dtype'] else '')


def figure(results) -> bytes:
  """PNG: speed-up of MSA against context, prefill and decode, with limits and published points."""
  from matplotlib.figure import Figure  # without pyplot: no global state and no display
  from matplotlib.ticker import FuncFormatter, NullLocator

  canvas = Figure(figsize=(11, 4.6), dpi=150, layout='constrained')
  limit = {'color': '0.35', 'linewidth': 1.5}
  for panel, (kernel, title) in zip(canvas.subplots(1, 2), TITLES.items()):
    if kernel == 'msa_prefill':
      panel.plot(CONTEXTS, list(map(flop_ratio, CONTEXTS)), label='FLOP ratio', **limit)
      for queries in tails(results):
        ratios = [work_ratios(N, queries)[0] for N in CONTEXTS]
        panel.plot(CONTEXTS, ratios, linestyle=':', label=f'FLOP ratio, last {queries} queries', **limit)
    else:
      panel.plot(CONTEXTS, [work_ratios(N, 1)[1] for N in CONTEXTS], label='byte ratio', **limit)
      panel.plot(CONTEXTS, [work_ratios(N, 1)[0] for N in CONTEXTS], linestyle=':', label='FLOP ratio', **limit)
    panel.plot(CONTEXTS[-1], PUBLISHED[kernel], '*', color='#000000', markersize=13, linestyle='none', zorder=4,
               label=f'published, H800: {PUBLISHED[kernel]}')  # fmt: skip
    for number, result in enumerate(results):
      cases = [case for case in result['cases'] if case['kernel'] == kernel and 'ratio' in case]
      for name in sorted({case['implementation'] for case in cases}):
        points = sorted((case['context'], case['ratio']) for case in cases if case['implementation'] == name)
        middle = [ratio['median'] for _, ratio in points]
        beyond = [[ratio['median'] - ratio['min'] for _, ratio in points],
                  [ratio['max'] - ratio['median'] for _, ratio in points]]  # fmt: skip
        panel.errorbar([context for context, _ in points], middle, beyond, color=COLOURS[number % len(COLOURS)],
                       marker='o', markersize=4, capsize=2, label=f'{label(result)}: {name}')  # fmt: skip
    panel.axhline(1, color='0.3', lw=1)
    panel.set_xscale('log', base=2)
    panel.set_yscale('log', base=2)
    panel.set_xticks(CONTEXTS)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda N, _: '1M' if N >= 1 << 20 else f'{int(N) >> 10}k'))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f'{ratio:g}'))
    panel.set(title=title, xlabel='tokens of context', ylabel='times as fast as full attention')
    panel.grid(alpha=0.25)
    panel.spines[['top', 'right']].set_visible(False)
    panel.set_ylim(0.7, 200)  # room for the legend above the limits
    panel.set_yticks([1, 2, 4, 8, 16, 32])
    panel.legend(frameon=False, loc='upper left')
  png = io.BytesIO()
  canvas.savefig(png, format='png')
  return png.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# page


def page(results) -> str:
  sections = ''.join(measured(path, result) for path, result in results.items())
  return PAGE.format(
      flop_1m=flop_ratio(1 << 20), flop_8k=flop_ratio(1 << 13), byte_1m=work_ratios(1 << 20, 1)[1],
      byte_1m_float8=work_ratios(1 << 20, 1, M3._replace(index_dtype=jnp.dtype('float8_e4m3fn')))[1],
      tail=' or '.join(map(str, tails(results.values()))) or 'few', measured=sections,
      kernels=kernel_table(list(results.values())), work=work_table(),
  )  # fmt: skip


def short(value) -> str:
  """Three digits."""
  return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def table(rows, numbers=()) -> str:
  """Markdown; the first row is the head, and columns in `numbers` stand to the right."""
  head, *body = ['| ' + ' | '.join(row) + ' |' for row in rows]
  return '\n'.join([head, '|' + '|'.join('--:' if i in numbers else ':--' for i in range(len(rows[0]))) + '|', *body])


def measured(path, result) -> str:
  """The section of one file of figures."""
  rows = [['kernel', 'form', 'tokens', 'ms (lowest to highest)', 'TFLOP/s', 'GB/s', 'roofline', 'against a peer']]
  for case in result['cases']:
    side = case['sides'][case['implementation']]
    low, middle, high = (1e3 * side['seconds'][name] for name in ('min', 'median', 'max'))
    ratio = case.get('ratio')
    against = '' if ratio is None else (
        f'{ratio["median"]:.2f} ({ratio["min"]:.2f} to {ratio["max"]:.2f}) × {case["peer"]}, '
        f'itself at {case["sides"][case["peer"]]["roofline_share"]:.0%}'
    )
    rows.append([
        case['kernel'], case['implementation'], shown((case['context'], case['queries'])),
        f'{short(middle)} ({short(low)} to {short(high)})', short(side['flops_per_second'] / 1e12),
        short(side['bytes_per_second'] / 1e9),
        f'{side["roofline_share"]:.0%}', against,
    ])  # fmt: skip
  ceiling, versions = result['ceilings'], result['versions']
  where = result['cpu'] if result['device'] == 'cpu' else result['device_kind']
  load = result['load_average_before']
  busy = ' of other work, beside which the run had real-time priority' if result['real_time_priority'] else (
      ' (**other work ran beside it: figures are off**)'
  )
  worst = max(result['numerics'], key=lambda check: check['error'] / check['tolerance'])
  left_out = [*result['left_out'], *(f'{case["kernel"]}, peer {line}' for case in result['cases']
                                     for line in case['peers_left_out'])]  # fmt: skip
  return '\n'.join([
      f'## Measured: {label(result)}', '',
      f'{where}, jax {versions["jax"]}, {result["date"]}, load average at the start {load:.1f}'
      + (busy if load > BUSY else '') + '. Ceilings of the '
      f'run: products {ceiling["flops_per_second"]["median"] / 1e12:.3g} TFLOP/s, stream '
      f'{ceiling["bytes_per_second"]["median"] / 1e9:.3g} GB/s. All {len(result["numerics"])} forms and peers were '
      f'held against the oracle first; the worst was off by {worst["error"]:.1e} of the largest value '
      f'({worst["kernel"]}, {worst["implementation"]}; allowed {worst["tolerance"]:.0e}). `256@8k` are the last 256 '
      f'queries of 8k tokens. Raw figures: `docs/results/{path.name}`.', '',
      table(rows, range(3, 7)), '', *(f'- Left out: {line}' for line in left_out), *([''] if left_out else []),
  ])  # fmt: skip


def kernel_table(results) -> str:
  """From the files and their tests: what each kernel is and what it has passed."""
  rows = [['kernel', 'for', 'what it is', 'interpreted', 'simulated', 'compiled for', 'run on']]
  for path in sorted((ROOT / 'mmx/kernels_pallas').glob('*_?pu.py')):
    name, chip = path.stem.rsplit('_', 1)
    text = path.read_text()
    if not re.search(r'\bpl(gpu)?\.(pallas_call|kernel)\(|\.launch\(', text):
      continue
    first = ast.get_docstring(ast.parse(text)).split('\n\n')[0]
    said = re.split(r'[.:;] ', re.sub(r'\s+', ' ', re.sub(r'\s*\([^)]*\)', '', first)))[0].rstrip('.')
    test, aot = ROOT / f'tests/kernels/test_{path.stem}.py', (f'test_{path.stem}_aot.py', f'test_{name}_aot.py')
    proof = test.read_text() if test.exists() else ''
    compiled = ''.join(found.read_text() for each in aot if (found := ROOT / 'tests/aot' / each).exists())
    chips = [names for fixture, names in FIXTURES[chip].items() if fixture in compiled]
    kinds = {
        result['device_kind'] for result in results if result['device'] == chip for check in result['numerics']
        if check['kernel'].startswith(MEASURED_BY.get(name, 'msa'))
        and check['implementation'] not in (*kernel_cases.EVERYWHERE, *kernel_cases.LIBRARY)
    }  # fmt: skip
    rows.append([
        f'`{path.name}`', CHIPS[chip], said, 'yes' if 'interpret' in proof or 'simulator(' in proof else 'no',
        'yes' if 'detect_races' in proof or 'simulat' in proof else '', ', '.join(chips) or 'not yet',
        ', '.join(sorted(kinds)) or 'not yet',
    ])  # fmt: skip
  return table(rows)


def work_table() -> str:
  formulas = {
      ('full attention', True): '4·H·Dh for each pair of query and key',
      ('MSA', True): '2·K·Di for each such pair, 4·H·Dh for each of at most k·b keys a query',
      ('full attention', False): '4·H·Dh·N',
      ('MSA', False): '2·K·Di·N + 4·H·Dh·k·b',
  }  # fmt: skip
  rows = [['kernel', 'FLOPs, forward', "at M3's heads, 1M tokens", 'FLOPs for each byte']]
  for (kind, whole), formula in formulas.items():
    shape = Shape(1 << 20, 1 << 20 if whole else 1)
    work, moved = (kernel_cases.msa_work if kind == 'MSA' else kernel_cases.attention_work)(M3, shape)
    rows.append([f'{kind}, {"prompt" if whole else "one token"}', formula, f'{work:.3g}', f'{work / moved:,.0f}'])
  return table(rows, (2, 3))


if __name__ == '__main__':
  with command.errors_in_one_line():
    if sys.argv[1:]:
      command.stop(f'unexpected argument {sys.argv[1]!r}; there are none')
    main()
