"""Spikes of the loss: which batch is one, decided inside the compiled step, from statistics that the state carries.

A batch is a spike if its loss, or the logarithm of its gradient norm, lies more than `train.spike_deviations` standard
deviations above the running mean, or if one of them is not finite. With `train.skip_spikes` it updates nothing but the
step counter. The statistics belong to the training state, so a run that is stopped and continued judges as one that was
not; where neither field is set they do not exist.
"""

import jax
import jax.numpy as jnp
from flax import struct

MEMORY = 128  # batches that the running statistics look back on
UNJUDGED = 32  # first batches, whose statistics say too little; what is not finite is a spike even then
LEAST_DEVIATION = 0.01  # nats, or 1% of a norm: what deviates less is no spike, however quiet the run


@struct.dataclass
class Spikes:
  """Running statistics of [loss, log gradient norm], and how many spikes there were."""

  seen: jax.Array  # int32, finite batches
  mean: jax.Array  # float32 [2]
  variance: jax.Array  # float32 [2]
  total: jax.Array  # int32
  in_a_row: jax.Array  # int32, up to the last batch


def start() -> Spikes:
  """Before the first batch."""
  zero = jnp.zeros((), jnp.int32)
  return Spikes(seen=zero, mean=jnp.zeros(2), variance=jnp.zeros(2), total=zero, in_a_row=zero)


def judge(spikes: Spikes, loss: jax.Array, grad_norm: jax.Array, deviations: float) -> tuple[Spikes, jax.Array]:
  """The statistics with this batch in them, and whether it is a spike (a bool scalar).

  deviations: 0 takes only what is not finite for a spike.
  """
  values = jnp.stack([loss, jnp.log(jnp.maximum(grad_norm, 1e-12))]).astype(jnp.float32)
  finite = jnp.isfinite(values).all()
  above = values - spikes.mean
  judged = (spikes.seen >= UNJUDGED) & (deviations > 0)
  limit = jnp.where(judged, deviations * jnp.maximum(jnp.sqrt(spikes.variance), LEAST_DEVIATION), jnp.inf)
  spike = ~finite | (above > limit).any()

  # An outlier counts as one at the limit: the mean follows a lasting change within a few hundred batches, no faster.
  weight = 1 / jnp.minimum(spikes.seen + 1, MEMORY)
  moved = jnp.where(finite, jnp.clip(above, -limit, limit), 0)
  return Spikes(
      seen=spikes.seen + finite,
      mean=spikes.mean + weight * moved,
      variance=jnp.where(finite, (1 - weight) * (spikes.variance + weight * moved**2), spikes.variance),
      total=spikes.total + spike,
      in_a_row=jnp.where(spike, spikes.in_a_row + 1, 0),
  ), spike


def choose(spike: jax.Array, old, new):
  """`old` if the batch is a spike, `new` if not, leaf by leaf."""
  return jax.tree.map(lambda before, after: jnp.where(spike, before, after), old, new)
