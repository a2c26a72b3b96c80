"""Slices of chips that are not here, for compilers that need none: libtpu's topologies, and hosts of H200s for XLA.

Rates are the vendors' (Cloud TPU's pages of v5e, v5p and v6e; NVIDIA's data sheet of the H200), memory what libtpu says
to a program that is too large.
"""

import importlib.util
import math
import os
from typing import NamedTuple

from mmx.config import ConfigError


class Chip(NamedTuple):
  """One device. Bytes and bytes a second; `links` is what it sends to its neighbours, all links together, one way."""

  memory: float  # what a program may use
  memory_rate: float
  links: float
  slices: tuple[str, ...]  # shapes that can be asked for


GIB = 2**30
SQUARES = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16')
CHIPS = {
    'v5e': Chip(15.75 * GIB, 819e9, 200e9, SQUARES),
    'v5p': Chip(95.74 * GIB, 2765e9, 600e9, CUBES),
    'v6e': Chip(31.25 * GIB, 1640e9, 400e9, SQUARES),
    'h200': Chip(139.8 * GIB, 4800e9, 450e9, ('1x8', '2x8', '4x8', '8x8', '16x8', '32x8')),  # hosts x cards
}
H200 = """
  gpu_device_info {
    threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
    shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    registers_per_core_limit: 65536 registers_per_block_limit: 65536
    memory_bandwidth: 4814270000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150109224960
    cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  }
  platform_name: "CUDA" device_description_str: "NVIDIA H200"
  dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
"""  # as XLA describes one to itself


def parse(name: str) -> tuple[str, Chip, int]:
  """'v5p:4x4x4' -> ('v5p', its figures, 64 devices).

  Raises:
    ConfigError: unknown chip or shape; the line lists those that are known.
  """
  kind, _, shape = name.partition(':')
  if kind not in CHIPS:
    raise ConfigError(f'--topology={name}: unknown chip {kind!r}; known are {", ".join(CHIPS)}, as in v5p:4x4x4')
  if shape not in CHIPS[kind].slices:
    raise ConfigError(f'--topology={name}: unknown shape; {kind} comes as {", ".join(CHIPS[kind].slices)}')
  return kind, CHIPS[kind], math.prod(map(int, shape.split('x')))


def devices_of(name: str):
  """jax devices of a slice that is not here, to compile for.

  Raises:
    ConfigError: unknown topology, or the compiler of its platform is not installed.
  """
  kind, _, _ = parse(name)
  if not importlib.util.find_spec('jax_cuda13_plugin' if kind == 'h200' else 'libtpu'):
    raise ConfigError(f"--topology={name}: its compiler is not installed; pip install -e '.[aot]'")
  # No chip and no metadata server is asked, and several processes may compile at a time.
  quiet = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
           'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_MIN_LOG_LEVEL': '3', 'TPU_STDERR_LOG_LEVEL': '3'}
  for variable, value in quiet.items():
    os.environ.setdefault(variable, value)
  from jax.experimental import topologies

  if kind == 'h200':
    cards = {'target_config': H200, 'topology': '1x' + name.partition(':')[2]}
    return topologies.get_topology_desc(platform='cuda', topology_name=name, **cards).devices
  return topologies.get_topology_desc(platform='tpu', topology_name=name).devices
