"""Eight virtual CPU devices for every test, set before jax is imported; single-device tests build a mesh of one."""

import os
from importlib import metadata

FLAGS = '--xla_force_host_platform_device_count=8'
if metadata.version('jax').startswith('0.10.'):  # has two ways to emit loops, of which the older compiles in half the time
  FLAGS += ' --xla_cpu_use_fusion_emitters=false'
os.environ.setdefault('XLA_FLAGS', FLAGS)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')  # tests compile much and compute little

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
