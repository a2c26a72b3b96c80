"""Attention: what do a window, a linear state and selected blocks cost where the answer lies far back?

Arms: `full` attention in all four layers; `sliding`, three layers with a window of 16 keys and one full layer;
`lightning`, three layers of linear attention and one full layer; `msa`, block-sparse attention in all layers, each
query reading 4 blocks of 4 keys. Every arm has the same tokens, data order, schedule and seeds, and equal parameters
within 0.1%: the gate of `lightning` and the index branch of `msa` are paid for with a narrower feed-forward (112
instead of 128); heads and widths are otherwise those of `full`.

Metric: RULER's score (the share of the expected answers found) in variable tracking over three hops at 128 symbols, the
length trained at, eight times the window, paired by seed. The table has all tasks at 128, 256 and 512.

Source: M2 report (arXiv:2605.26494), section 2.2.2, tables 2 and 3; for `msa`, arXiv:2606.13392.

Cost of all seeds: `cpu` took 15 minutes on two cores; `h200` is computed, not yet run.
"""

from mmx import config

SCALES = ('cpu', 'h200')
SEEDS = {'cpu': (0, 1, 2), 'h200': (0, 1, 2)}
METRIC = 'ruler.vt.128.score'
PUBLISHED = """
| M2 scale, continued pre-training | full | hybrid sliding window |
|---|---:|---:|
| RULER-32K CWE | 99.0 | 99.0 |
| RULER-32K multi-query needles | 99.0 | 99.0 |
| RULER-128K CWE | 90.0 | 72.0 |
| RULER-128K multi-query needles | 99.0 | 93.0 |
| HELMET ICL | 75.8 | 72.7 |
| MTOB k→e BLEURT | 60.0 | 45.0 |
| MTOB e→k ChrF | 44.8 | 27.2 |
| MMLU | 85.5 | 85.6 |
| MATH | 60.3 | 60.3 |

| after SFT | full | hybrid sliding window |
|---|---:|---:|
| AIME25 | 86.7 | 86.7 |
| ARC-AGI-1 | 38.9 | 39.6 |
| GPQA-D | 75.3 | 72.7 |
| MMLU-Pro | 80.5 | 80.1 |
| IFBench | 23.1 | 27.2 |
| SWE-verified | 54.7 | 50.2 |
| BrowseComp-zh | 32.8 | 28.7 |
| GAIA-103 | 53.4 | 51.5 |
| XBench-ds | 58.0 | 63.0 |
| τ²-retail | 62.3 | 67.5 |
| τ²-telecom | 32.5 | 21.0 |
| Terminal-Bench | 26.7 | 23.8 |

M2 report, tables 2 and 3: one run each; window, ratio of layers and number of tokens are not stated. Hybrid Lightning
is reported in words alone: equal on short benchmarks, behind in multi-hop reasoning at scale (section 2.2.2).
"""


def get_config(scale):
  return config.override(config.load(f'configs/scales/attention_{scale}.gin'), {'name': 'attention_ablation'})


def arms(base):
  model, heads = base.model, base.model.attention
  depth = config.num_layers(model.pattern)
  hybrid = lambda mixer: f'({mixer}/dense*3 full/dense)*{depth // 4}'
  # Columns of the feed-forward (3 D entries each) that hold as many parameters as what an arm adds to a layer: on three
  # layers of four, D x H x Dh of gate and D x 2 (H - K) x Dh of keys and values; on all, D x (K + 1) x Di of index.
  lightning = heads.head_dim * (3 * heads.num_heads - 2 * heads.num_kv_heads) / 4
  index = (heads.num_kv_heads + 1) * model.msa.index_dim / 3
  narrower = lambda columns: model.d_ff - round(columns / 16) * 16
  return {
      'full': base,
      'sliding': config.override(base, {'model.pattern': hybrid('sliding')}),
      'lightning': config.override(base, {'model.pattern': hybrid('lightning'), 'model.d_ff': narrower(lightning)}),
      'msa': config.override(base, {
          'model.pattern': f'msa/dense*{depth}', 'model.d_ff': narrower(index),
          'model.msa.warmup_steps': base.train.steps * 2 // 5,
      }),
  }
