"""Block-sparse attention: trained as such, or converted from full attention late, does it keep the loss?

Arms: `full`, full attention for all steps; `msa_pt`, MiniMax Sparse Attention from the first step, after a dense warm-up
of a tenth of the steps; `trunk`, full attention for seven tenths of the steps, without decay; `msa_cpt`, which takes
trunk's parameters, adds a new index branch and continues for the other three tenths: dense warm-up for a third of them,
then sparse, with the decay of the learning rate. `full`, `msa_pt` and `trunk` + `msa_cpt` have seen equal tokens.

Metric: held-out loss after equal tokens, paired by seed (trunk's own is that of the model in the making). TensorBoard
has the divergence, block recall and score recall of each layer's index branch under msa/.

Source: MiniMax Sparse Attention (arXiv:2606.13392), section 3.2 and table 2: 3T tokens, of which 40B warm-up; converted
at 2.6T. The index branch adds parameters: 5% of the active ones at scale cpu, 0.1% at the published shape.

Cost of all seeds: `cpu` took 8.7 minutes on two cores; `h200` is sized for 40 on one H200, computed, not yet run.
"""

from mmx import config

SCALES = ('cpu', 'h200')
SEEDS = {'cpu': (0, 1), 'h200': (0, 1, 2)}
METRIC = 'heldout_loss'
TOLERANCE = 0.06
PUBLISHED = """
| 109B, 3T tokens | full | MSA from the start | MSA converted |
|---|---:|---:|---:|
| MMLU | 67.0 | 67.2 | 66.8 |
| MMLU-Pro | 38.5 | 38.8 | 39.1 |
| BBH | 67.7 | 66.6 | 66.1 |
| GSM8K | 76.2 | 77.7 | 73.7 |
| HumanEval | 61.0 | 64.0 | 57.9 |
| RULER-8K | 79.8 | 84.2 | 77.2 |
| RULER-32K | 75.0 | 77.5 | 75.7 |
| perplexity, SWE | 1.216 | 1.218 | 1.216 |
| perplexity, HLE | 1.275 | 1.278 | 1.275 |

MSA, table 2: one run each; block recall about 0.70 to 0.75 and score recall 0.90 to 0.94 (figure 3).
"""


def get_config(scale):
  base = config.load(f'configs/scales/{scale}.gin')
  few = {'cpu': {'model.msa.block_size': 16, 'model.msa.top_k': 4, 'model.msa.index_dim': 32}}  # 64 of 256 keys
  many = {'model.msa.block_size': 64, 'model.msa.top_k': 4, 'model.msa.index_dim': 64}
  return config.override(base, {'name': 'msa_conversion'} | few.get(scale, many))


def arms(base):
  steps, sparse = base.train.steps, {'model.pattern': base.model.pattern.replace('full', 'msa')}
  begun = steps * 7 // 10
  rest = steps - begun
  return {
      'full': base,
      'msa_pt': config.override(base, sparse | {'model.msa.warmup_steps': steps // 10}),
      'trunk': config.override(base, {'train.steps': begun, 'optim.decay_steps': 0}),
      'msa_cpt': config.override(base, sparse | {
          'train.init_from': 'trunk', 'train.steps': rest, 'model.msa.warmup_steps': rest // 3,
          'optim.warmup_steps': rest // 12, 'optim.decay_steps': rest * 2 // 3,
          'data.seed': base.data.seed + 1000,  # other documents than trunk has seen
      }),
  }
