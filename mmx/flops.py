"""Parameters and FLOPs by arithmetic, and what a device can do at most. No jax until a device is measured.

Letters: D d_model, V vocab, H heads, K kv heads, Dh head dim, E experts, k experts per token, F their hidden, T tokens.
"""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mmx.config import ConfigError, Experiment, Layer, ModelConfig, parse_pattern

# --- parameters -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterCount:
  """Trained parameters of a model. The expert biases are apart: a rule moves them, the optimizer never sees them."""

  total: int  # everything the optimizer updates, MTP modules included
  active: int  # at work on one token of the main model, without embedding and head: the 9.8B of M2
  router: int  # D*E in every MoE layer of the main model, part of total and active
  embedding: int  # embedding and head
  mtp: int  # MTP modules, which share embedding and head
  router_bias: int  # one per expert and layer, MTP modules included; not in total, but in released checkpoints

  @property
  def active_without_router(self) -> int:
    return self.active - self.router


@dataclass(frozen=True)
class _LayerCount:
  """One layer. Each entry of a matrix costs a token one multiplication and one addition."""

  matrices: int  # at work on a token: mixer, router, chosen and shared experts, or the dense feed-forward
  vectors: int  # norm scales
  idle: int  # experts not chosen
  router: int
  router_bias: int


def _mixer_count(model: ModelConfig, mixer: str) -> tuple[int, int]:
  """(entries of matrices, entries of norm scales), a key shift left out."""
  D, a, lightning, msa = model.d_model, model.attention, model.lightning, model.msa
  if mixer == 'lightning':
    width = lightning.num_heads * lightning.head_dim
    return 5 * D * width, width  # q, k, v, gate, o; the output norm
  q_width, kv_width = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
  matrices = 2 * D * q_width + 2 * D * kv_width  # q and o, k and v
  vectors = {'none': 0, 'full_width': q_width + kv_width, 'per_head': 2 * a.head_dim}[a.qk_norm]
  if mixer == 'msa':
    matrices += D * msa.index_dim * (a.num_kv_heads + 1)  # a query head per kv head, one shared key head
    vectors += 2 * msa.index_dim if msa.index_norm == 'per_head' else 0
  return matrices, vectors


def _layer_count(model: ModelConfig, layer: Layer) -> _LayerCount:
  D, moe = model.d_model, model.moe
  mixer, vectors = _mixer_count(model, layer.mixer)
  vectors += 2 * D + (2 * D if model.key_shift == 'learned' else 0)
  if layer.ffn == 'dense':
    return _LayerCount(mixer + 3 * D * model.d_ff, vectors, 0, 0, 0)
  expert, router = 3 * D * moe.d_ff, D * moe.num_experts
  return _LayerCount(
      matrices=mixer + router + moe.top_k * expert + 3 * D * moe.shared_d_ff,
      vectors=vectors,
      idle=(moe.num_experts - moe.top_k) * expert,
      router=router,
      router_bias=moe.num_experts,
  )


def _layers(model: ModelConfig) -> list[tuple[Layer, int]]:
  """(layer, how often) in the order of the pattern."""
  return [(layer, segment.repeats) for segment in parse_pattern(model.pattern) for layer in segment.unit]


def count_parameters(model: ModelConfig) -> ParameterCount:
  """Counts by arithmetic; the same numbers that initialising the model gives, without memory for it."""
  D, depth = model.d_model, model.mtp.depth
  layers = [(_layer_count(model, layer), repeats) for layer, repeats in _layers(model)]
  active = sum((c.matrices + c.vectors) * repeats for c, repeats in layers) + D  # the final norm
  embedding = model.vocab_size * D * (1 if model.tie_embeddings else 2)
  last = layers[-1][0]  # an MTP module: projection, three norms and a layer of the last kind
  mtp = depth * (2 * D * D + 3 * D + last.matrices + last.vectors + last.idle)
  return ParameterCount(
      total=active + sum(c.idle * repeats for c, repeats in layers) + embedding + mtp,
      active=active,
      router=sum(c.router * repeats for c, repeats in layers),
      embedding=embedding,
      mtp=mtp,
      router_bias=sum(c.router_bias * repeats for c, repeats in layers) + depth * last.router_bias,
  )


def assert_comparable(arms: Mapping[str, ModelConfig], tolerance: float = 0.01) -> None:
  """Arms of a fair ablation have equal total and equal active parameters, within `tolerance` of the first arm.

  Active parameters are compared without the router's projection. Its D*E entries grow with the number of experts by
  construction: from 32 to 128 experts it adds 0.5% of the active parameters to the published shape, but 5% to the one
  of scale cpu, with d_model 128. `ParameterCount.active` has the figure with the router.

  Raises:
    ConfigError: names the two arms and both numbers.
  """
  counts = {name: count_parameters(model) for name, model in arms.items()}
  first = next(iter(counts))
  for name, count in counts.items():
    for what in ('total', 'active_without_router'):
      ours, theirs = getattr(count, what), getattr(counts[first], what)
      if abs(ours - theirs) > tolerance * theirs:
        kind = what.replace('_', ' ')
        raise ConfigError(
            f'arms {first} and {name} are not comparable: {theirs:,} against {ours:,} {kind} parameters, '
            f'{ours / theirs - 1:+.1%} where {tolerance:.0%} is allowed'
        )


# --- work -------------------------------------------------------------------------------------------------------------


def mixing_flops(model: ModelConfig, mixer: str, T: int) -> int:
  """Forward FLOPs per token of a causal row of T that a mixer spends between tokens, projections aside.

  Scores and their product with the values are 2 * H*Dh each per key. A query sees T/2 keys on average, or those of its
  window, or of its selected blocks; the index branch scores all of the T/2 (MSA, section 2.3). Lightning updates and
  reads a state of Dh*Dh per head. That documents packed into one row do not see each other is not subtracted.
  """
  a, lightning, msa = model.attention, model.lightning, model.msa
  if mixer == 'lightning':
    return 4 * lightning.num_heads * lightning.head_dim**2
  per_key = 4 * a.num_heads * a.head_dim
  if mixer == 'sliding':
    W = min(model.sliding.window, T)
    sinks = min(model.sliding.sink_tokens, T - W)
    return per_key * (W * (2 * T - W) // 2 + sinks * (T - W)) // T
  if mixer == 'msa':
    return per_key * min(msa.top_k * msa.block_size, T // 2) + a.num_kv_heads * msa.index_dim * T
  return per_key * T // 2


def step_flops(experiment: Experiment) -> int:
  """FLOPs of a training step per token, forward and backward, that the model itself needs: the numerator of MFU.

      3 * (sum over layers of (2 * matrices at work on a token + mixing) + 2 * D*V * (1 + MTP depth))

  3: the backward pass takes twice the forward. A matrix entry is a multiplication and an addition; `mixing_flops` says
  what tokens cost each other. An MTP module adds its projection (2D*D), its layer and the head. Not counted: norms,
  softmax, rotations, the embedding's lookup, the optimizer, MSA's warm-up, and whatever rematerialisation computes
  twice.
  """
  model, T = experiment.model, experiment.data.seq_len
  D, depth = model.d_model, model.mtp.depth
  cost = lambda layer: 2 * _layer_count(model, layer).matrices + mixing_flops(model, layer.mixer, T)
  layers = [(cost(layer), repeats) for layer, repeats in _layers(model)]
  main = sum(flops * repeats for flops, repeats in layers)
  mtp = depth * (2 * 2 * D * D + layers[-1][0])
  head = 2 * D * model.vocab_size * (1 + depth)
  return 3 * (main + mtp + head)


# --- devices ----------------------------------------------------------------------------------------------------------


# Dense bfloat16 products, FLOP/s as the vendors state them, for one device as jax counts them: a TPU v7x chip shows as
# two. By the beginning of jax's `device_kind`; the longest that fits counts.
PEAK_FLOPS = {
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,  # v5e
    'TPU v5e': 197e12,
    'TPU v5': 459e12,  # v5p
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,  # v6e
    'TPU v6e': 918e12,
    'TPU7x': 1153e12,
    'NVIDIA A100': 312e12,
    'NVIDIA H100': 989e12,  # SXM
    'NVIDIA H100 PCIe': 756e12,
    'NVIDIA H100 NVL': 835e12,
    'NVIDIA H200': 989e12,
    'NVIDIA GH200': 989e12,
    'NVIDIA B200': 2250e12,
    'NVIDIA GB200': 2500e12,
    'NVIDIA L4': 121e12,
    'NVIDIA L40S': 362e12,
}


def peak_flops(device, dtype: str = 'bfloat16') -> float:
  """FLOP/s at most of one jax device, the denominator of MFU; NaN for a chip that is not in the table.

  float32 is what jax's default precision makes of it: TF32 at half the bfloat16 rate on a GPU, bfloat16 passes on a
  TPU. A CPU is measured (0.3 s), in float32 for either dtype, and its virtual devices share the figure.
  """
  if device.platform == 'cpu':
    import jax

    return measured_cpu_peak() / jax.local_device_count(backend='cpu')
  fitting = [kind for kind in PEAK_FLOPS if re.match(re.escape(kind) + r'\b', device.device_kind)]
  if not fitting:
    return math.nan
  peak = PEAK_FLOPS[max(fitting, key=len)]
  return peak / 2 if dtype == 'float32' and device.platform != 'tpu' else peak


def measured_cpu_peak() -> float:
  """FLOP/s of the fastest of many float32 products of 1024 x 1024 matrices, on all cores this process may use."""
  import jax  # here: counting parameters needs no jax

  size = 1024  # 2 GFLOP: long enough to time, short enough to repeat
  matrix = jax.device_put(np.ones((size, size), np.float32), jax.local_devices(backend='cpu')[0])
  product = jax.jit(jax.numpy.matmul)
  product(matrix, matrix).block_until_ready()
  fastest, end = math.inf, time.perf_counter() + 0.3
  while time.perf_counter() < end:
    start = time.perf_counter()
    product(matrix, matrix).block_until_ready()
    fastest = min(fastest, time.perf_counter() - start)
  return 2 * size**3 / fastest
