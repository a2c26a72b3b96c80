"""Parameters and FLOPs by arithmetic, against the released model, the initialised model and XLA's own count."""

import math
import types

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from mmx import config, flops
from mmx.config import ConfigError, Experiment
from mmx.model import Decoder, init_variables

M2_RELEASED = 228_689_764_864  # parameters of the released checkpoints, one bias per expert included


def changed(**overrides):
  """Default experiment with `model__d_model=…` overrides."""
  return config.override(Experiment(), {path.replace('__', '.'): value for path, value in overrides.items()})


def test_m2_has_exactly_the_released_number_of_parameters():
  count = flops.count_parameters(config.load('configs/models/m2_230b.gin').model)
  assert count.router_bias == 62 * 256
  assert count.total + count.router_bias == M2_RELEASED
  assert round(count.active / 1e9, 1) == 9.8


@pytest.mark.parametrize('arm', ['e32_top2', 'e128_top8'])
def test_ablation_models_have_the_published_size(arm):
  count = flops.count_parameters(config.load(f'configs/models/m2_ablation_{arm}.gin').model)
  assert (round(count.total / 1e9, 1), round(count.active / 1e9, 1)) == (17.8, 2.0)


@pytest.mark.parametrize('overrides', [
    {},
    dict(model__attention__qk_norm='none', model__moe__gate='softmax'),
    dict(
        model__pattern='full/dense*2 (full full/dense)*2', model__moe__shared_d_ff=24, model__mtp__depth=1,
        model__tie_embeddings=True, model__attention__qk_norm='per_head', model__d_model=96,
    ),
    dict(model__pattern='full/dense full', model__mtp__depth=2, model__moe__num_experts=5),
])  # fmt: skip
def test_parameters_counted_are_parameters_initialised(overrides):
  model = changed(**overrides).model
  variables = jax.eval_shape(lambda: init_variables(model, None, jax.random.key(0)))
  sizes = {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for name, tree in variables.items()}
  count = flops.count_parameters(model)
  assert (count.total, count.router_bias) == (sizes['params'], sizes['router'])


def test_parts_of_the_count_add_up():
  plain = flops.count_parameters(Experiment().model)
  ahead = flops.count_parameters(changed(model__mtp__depth=2).model)
  assert ahead.total - plain.total == ahead.mtp and plain.mtp == 0
  assert ahead.active == plain.active  # MTP modules are not at work on the main model's token
  assert plain.total - plain.embedding - plain.active == 2 * 30 * 3 * 128 * 256  # 30 of 32 experts idle in two layers
  assert plain.active - plain.active_without_router == plain.router == 2 * 128 * 32
  assert plain.embedding == 2 * flops.count_parameters(changed(model__tie_embeddings=True).model).embedding


@pytest.mark.parametrize('depth', [0, 1])
def test_flops_are_those_that_xla_counts(depth):
  """Forward pass of a dense model, uncompiled; XLA counts whole score matrices, and 1% of norms and softmax."""
  experiment = changed(
      model__pattern='full/dense', model__d_model=256, model__d_ff=1024, model__attention__num_heads=8,
      model__attention__implementation='reference', model__vocab_size=512, model__mtp__depth=depth, data__seq_len=128,
  )  # fmt: skip
  model, B, T = experiment.model, 2, 128
  tokens_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
  variables = nn.unbox(jax.eval_shape(lambda: init_variables(model, None, jax.random.key(0))))

  def forward(variables, tokens_BT):
    out = Decoder(model).apply(variables, tokens_BT, tokens_BT, tokens_BT)
    return [hidden @ out.head for hidden in (out.hidden, *out.mtp)]

  counted = jax.jit(forward).lower(variables, tokens_BT).cost_analysis()['flops']
  masked_half = (1 + depth) * 2 * 8 * 32 * T
  assert counted / (B * T) == pytest.approx(flops.step_flops(experiment) / 3 + masked_half, rel=0.015)


def test_step_flops_of_a_sparse_model_by_hand():
  D, H, K, Dh, E, k, F, V, T = 128, 4, 2, 32, 32, 2, 256, 264, 256
  attention = 2 * (2 * D * H * Dh + 2 * D * K * Dh) + 2 * H * Dh * T
  ffn = 2 * (D * E + k * 3 * D * F)
  assert flops.step_flops(Experiment()) == 3 * (2 * (attention + ffn) + 2 * D * V)
  shared = changed(model__moe__shared_d_ff=64)
  assert flops.step_flops(shared) - flops.step_flops(Experiment()) == 3 * 2 * 2 * 3 * D * 64


def test_arms_of_unequal_size_are_refused_and_a_larger_router_is_not():
  base = Experiment()
  fine = config.override(base, {'model.moe.num_experts': 128, 'model.moe.top_k': 8, 'model.moe.d_ff': 64})
  flops.assert_comparable({'e32': base.model, 'e128': fine.model})
  counts = [flops.count_parameters(e.model) for e in (base, fine)]
  assert counts[1].active / counts[0].active > 1.04  # all of it router
  with pytest.raises(ConfigError, match='arms e32 and wide are not comparable: .* total parameters, .*% where 1% is'):
    flops.assert_comparable({'e32': base.model, 'wide': changed(model__moe__d_ff=260).model})
  with pytest.raises(ConfigError, match='arms e32 and top4 are not comparable: .* active without router parameters'):
    flops.assert_comparable({'e32': base.model, 'top4': changed(model__moe__top_k=4).model})


@pytest.mark.parametrize('kind, platform, bf16', [
    ('TPU v4', 'tpu', 275e12),
    ('TPU v5 lite', 'tpu', 197e12),
    ('TPU v5', 'tpu', 459e12),
    ('TPU v5p', 'tpu', 459e12),
    ('TPU v6 lite', 'tpu', 918e12),
    ('NVIDIA H100 80GB HBM3', 'gpu', 989e12),
    ('NVIDIA H100 PCIe', 'gpu', 756e12),
    ('NVIDIA H200', 'gpu', 989e12),
    ('NVIDIA A100-SXM4-40GB', 'gpu', 312e12),
    ('NVIDIA L40S', 'gpu', 362e12),
    ('NVIDIA L40', 'gpu', math.nan),
    ('TPU v2', 'tpu', math.nan),
])  # fmt: skip
def test_peak_is_read_from_the_device_kind(kind, platform, bf16):
  device = types.SimpleNamespace(device_kind=kind, platform=platform)
  assert flops.peak_flops(device) == pytest.approx(bf16, nan_ok=True)
  assert flops.peak_flops(device, 'float32') == pytest.approx(bf16 if platform == 'tpu' else bf16 / 2, nan_ok=True)


def test_virtual_cpu_devices_share_the_measured_peak(monkeypatch):
  peak = flops.measured_cpu_peak()
  assert 1e9 < peak < 1e14
  monkeypatch.setattr(flops, 'measured_cpu_peak', lambda: 8e11)
  assert flops.peak_flops(jax.devices()[0]) == 8e11 / jax.local_device_count()
