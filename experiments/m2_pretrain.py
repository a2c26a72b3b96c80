"""MiniMax-M2's pre-training at full size: does it fit, and what does a step cost at each of its context lengths?

Arms are its stages, one after the other, each from the parameters of the one before: `8k` with a constant learning rate,
then `32k` and `192k`, over which it decays. 228.69B parameters and one MTP module of 3.69B; QK norms, expert biases moved
by load, AdamW in float32. At long contexts `mesh.context` splits the tokens of a row over chips.

Metric: held-out loss at the end of each stage, each at its own length.

Source: M2 report (arXiv:2605.26494), section 3: 29.2T tokens, of which 9.3T while the learning rate decays, 8K, 32K and
192K tokens of context; MTP weight 0.3, then 0.1. Batch, learning rate, optimizer and the length of each stage are not
published: those here are ours.

Cost: `cpu` is a miniature of the same three stages. The others have not run; they are compiled ahead of time, by
`python -m mmx.aot --config=experiments/m2_pretrain.py --scale=v5p_64 --arm=8k --topology=v5p:4x4x4` or
scripts/aot_matrix.py, and docs/aot.md says which have been. 64 chips hold the model; to train it in months takes more.
"""

from typing import NamedTuple

from mmx import config

SCALES = ('cpu', 'v5p_64', 'v5p_512', 'v6e_256', 'h200_32')
SEEDS = dict.fromkeys(SCALES, (0,))
METRIC = 'heldout_loss'
TOLERANCE = 0.06
PUBLISHED = """
M2 report, table 2: M2-Base, 29.2T tokens: MMLU 85.5, RULER-32K CWE 99.0 and MQ 99.0. No loss is published.
"""

TOKENS = {'8k': 19.9e12, '32k': 6.2e12, '192k': 3.1e12}  # the split of the last 9.3T is ours
CPU_STEPS = {'8k': 100, '32k': 30, '192k': 20}
PEAK, BETWEEN, LAST = 1.0, 0.4, 0.1  # learning rate: of the first stage, between the others, at the end


class Layout(NamedTuple):
  """A batch, where it lies, and what its backward pass makes again. Axes of a mesh must be products of sides of the slice."""

  rows: int
  tokens: int  # of a row
  mesh: config.MeshConfig
  remat: str = 'mixer'  # where memory allows: at 192K tokens attention is most of the work


def over(expert, context=1, fsdp=1):
  return config.MeshConfig(fsdp=fsdp, expert=expert, context=context)


LAYOUTS = {
    'cpu': {
        '8k': Layout(32, 128, over(-1), 'none'), '32k': Layout(16, 256, over(-1), 'none'),
        '192k': Layout(8, 512, over(-1), 'none'),
    },
    'v5p_64': {
        '8k': Layout(32, 8192, over(16, 4)), '32k': Layout(16, 32768, over(16, 4)),
        '192k': Layout(4, 196608, over(4, 16)),
    },
    'v5p_512': {
        '8k': Layout(512, 8192, over(64, fsdp=8)), '32k': Layout(64, 32768, over(64, 8)),
        '192k': Layout(64, 196608, over(64, 8)),
    },
    'v6e_256': {
        '8k': Layout(256, 8192, over(256), 'full'), '32k': Layout(64, 32768, over(16, 16), 'full'),
        '192k': Layout(16, 196608, over(16, 16), 'offload'),
    },
    'h200_32': {
        '8k': Layout(32, 8192, over(32)), '32k': Layout(8, 32768, over(8, 4)),
        '192k': Layout(2, 196608, over(2, 16), 'full'),
    },
}


def get_config(scale):
  recipe = {'name': 'm2_pretrain', 'optim.schedule': 'constant', 'model.mtp.depth': 1}
  if scale == 'cpu':
    base = config.load('configs/scales/cpu.gin')
    recipe |= {'model.moe.num_experts': 128, 'model.moe.top_k': 8, 'model.moe.d_ff': 64}
  else:
    base = config.load('configs/models/m2_230b.gin')
    recipe |= {
        'data.source': 'arrayrecord:data/pretrain', 'data.tokenizer': 'data/tokenizer.json',
        'data.heldout_fraction': 1e-4, 'model.moe.transport': 'direct', 'model.moe.capacity_factor': 1.5,
        'optim.learning_rate': 2e-4, 'optim.warmup_steps': 2000, 'train.loss_chunk': 65536, 'train.log_every': 20,
        'train.histogram_every': 500, 'train.checkpoint_every': 500, 'eval.every': 2000, 'eval.batches': 4,
    }
  if scale == 'h200_32':
    # 'auto' takes no kernels of one generation of GPUs. Its own form of experts would take ten times as long; of attention
    # cuDNN serves whole rows only, by a bias of [T, T] for their documents. Memory is short.
    recipe |= {
        'model.moe.implementation': 'hopper', 'model.attention.implementation': 'hopper', 'train.loss_chunk': 16384,
    }
  return stage(config.override(base, recipe), LAYOUTS[scale], '8k')


def arms(base):
  layouts = next(found for found in LAYOUTS.values() if found['8k'] == laid(base))
  peak = base.optim.learning_rate

  def decaying(name, origin, start, end, weights):
    longer = stage(base, layouts, name)
    warmup = min(200, longer.train.steps // 10)  # of the optimizer's moments, which begin anew
    return config.override(longer, {
        'train.init_from': origin, 'optim.schedule': 'wsd', 'optim.warmup_steps': warmup,
        'optim.decay_steps': longer.train.steps - warmup, 'optim.learning_rate': start * peak,
        'optim.final_lr_ratio': end / start, 'model.mtp.weight': weights[0], 'model.mtp.final_weight': weights[1],
        'data.seed': base.data.seed + 1000 * (1 + list(layouts).index(name)),  # other documents than those seen before
    })

  return {
      '8k': base,
      '32k': decaying('32k', '8k', PEAK, BETWEEN, (0.3, 0.2)),
      '192k': decaying('192k', '32k', BETWEEN, LAST, (0.2, 0.1)),
  }


def laid(experiment):
  return Layout(experiment.data.batch_size, experiment.data.seq_len, experiment.mesh, experiment.model.remat)


def stage(base, layouts, name):
  """`base` at the length of a stage, for as many steps as its tokens take."""
  rows, tokens, mesh, remat = layouts[name]
  steps = CPU_STEPS[name] if layouts is LAYOUTS['cpu'] else int(TOKENS[name] / (rows * tokens))
  axes = {f'mesh.{axis}': getattr(mesh, axis) for axis in config.MESH_AXES}
  return config.override(
      base, {'data.batch_size': rows, 'data.seq_len': tokens, 'train.steps': steps, 'model.remat': remat} | axes
  )
