"""AdamW with clipping, decay on matrices only, and learning-rate schedules."""

import jax
import jax.numpy as jnp
import optax

from mmx.config import MTPConfig, OptimConfig


def schedule(optim: OptimConfig, steps: int):
  """Learning rate as a function of the optimizer step (0-based), for `steps` steps in all.

  'wsd': linear warm-up, constant, linear decay to final_lr_ratio over the last decay_steps (M2's constant and decay
  phases). 'cosine': linear warm-up, then a half cosine. 'constant': linear warm-up only.
  """
  peak, final, warmup = optim.learning_rate, optim.learning_rate * optim.final_lr_ratio, optim.warmup_steps
  rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  if optim.schedule == 'wsd':
    after = optax.schedules.join_schedules(
        [optax.constant_schedule(peak), optax.linear_schedule(peak, final, optim.decay_steps)],
        [steps - warmup - optim.decay_steps],
    )
  elif optim.schedule == 'cosine':
    after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=optim.final_lr_ratio)
  else:
    after = optax.constant_schedule(peak)
  return optax.schedules.join_schedules([rise, after], [warmup]) if warmup else after


def mtp_weight(mtp: MTPConfig, optim: OptimConfig, steps: int):
  """MTP loss weight by step: constant, then linear to `final_weight` while the rate decays (M2: 0.3 to 0.1)."""
  decay = optim.decay_steps if optim.schedule == 'wsd' else 0
  if not decay:
    return optax.constant_schedule(mtp.weight)
  return optax.linear_schedule(mtp.weight, mtp.final_weight, decay, transition_begin=steps - decay)


def decays(params):
  """True for matrices; norm scales ('scale', '*_norm') and 'key_shift' are not. Layer stacking hides the rank."""

  def is_matrix(path, _):
    name = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]  # a box of axes may follow
    return name not in ('scale', 'key_shift') and not name.endswith('_norm')

  return jax.tree_util.tree_map_with_path(is_matrix, params)


def clip(norm: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm` with one factor for all: that divides each element, and XLA, which repeats a product for
  each of its readers but no division, writes all gradients once more (1% of a step of experiments/moe_ablation.py)."""

  def update(grads, state, params=None):
    del params
    factor = norm / jnp.maximum(optax.global_norm(grads), norm)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def build(optim: OptimConfig, steps: int) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW with decoupled decay; moments are float32."""
  transforms = [
      optax.scale_by_adam(optim.b1, optim.b2, optim.eps, mu_dtype=jnp.float32),
      optax.add_decayed_weights(optim.weight_decay, mask=decays),
      optax.scale_by_learning_rate(schedule(optim, steps)),
  ]
  if optim.clip_norm:
    transforms.insert(0, clip(optim.clip_norm))
  return optax.chain(*transforms)
