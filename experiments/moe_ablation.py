"""Fine-grained experts: does cutting every expert into four help at equal total and active parameters?

Arms: `e32_top2`, 32 experts of which 2 work on a token, and `e128_top8`, 128 experts of a quarter of the width of which
8 do. The arms share parameters (within 1% of each other, the router's own projection aside), tokens, data order,
schedule and seeds.

Metric: held-out loss after equal tokens, paired by seed. The published comparison is by downstream benchmarks.

Source: M2 report (arXiv:2605.26494), section 2.2.1, table 1: 2B active, 17.8B total, 500B tokens, one run each.

Cost of all seeds: `cpu` took 7 to 9 minutes on two cores; `h200` is sized for 25 on one H200 and
`v5p_64`, the published size, for 24 days on 64 TPU v5p chips: both computed, not yet run.
"""

from mmx import config

SCALES = ('cpu', 'h200', 'v5p_64')
SEEDS = {'cpu': (0, 1, 2, 3), 'h200': (0, 1, 2), 'v5p_64': (0,)}
METRIC = 'heldout_loss'
PUBLISHED = """
| Benchmark (shots) | 32 experts, top-2 | 32 experts, top-2, with MTP | 128 experts, top-8 |
|---|---:|---:|---:|
| MATH (4) | 19.6 | 21.3 | 24.1 |
| MMLU (5) | 39.8 | 39.7 | 40.2 |
| ARC-Challenge (25) | 27.4 | 27.5 | 27.8 |
| KorBench (3) | 14.1 | 15.0 | 14.8 |
| HumanEval (0) | 29.7 | 30.1 | 32.5 |

M2 report, table 1: 2B active, 17.8B total parameters, 500B tokens, one run each.
"""


def get_config(scale):
  return config.override(config.load(f'configs/scales/{scale}.gin'), {'name': 'moe_ablation'})


def arms(base):
  moe = base.model.moe
  cut = {'num_experts': 4 * moe.num_experts, 'top_k': 4 * moe.top_k, 'd_ff': moe.d_ff // 4}
  return {
      'e32_top2': base,
      'e128_top8': config.override(base, {f'model.moe.{name}': value for name, value in cut.items()}),
  }
