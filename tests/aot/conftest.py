"""Compiles for accelerators that are not here: `pip install -e '.[test,aot]' && pytest -m aot`."""

import os
import re
from typing import NamedTuple

import jax
import pytest
from jax.experimental import topologies

TPUS = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}
HOPPER = """
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
"""  # an H200 as XLA describes one to itself


def pytest_collection_modifyitems(items):
  for item in items:
    if item.path.parent.name == 'aot':
      item.add_marker(pytest.mark.aot)


@pytest.fixture(params=TPUS)
def compile_for_tpu(request):
  """compile_for_tpu(function, *arguments) -> jax.stages.Compiled for one chip, of each generation in turn.

  Arguments are trees of jax.ShapeDtypeStruct. What a chip refuses, such as too much VMEM, raises as it would there.
  """
  pytest.importorskip('libtpu', reason="needs the extra aot: pip install -e '.[aot]'")
  # No chip and no metadata server is asked, and several processes may compile at a time.
  quiet = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
           'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_MIN_LOG_LEVEL': '3', 'TPU_STDERR_LOG_LEVEL': '3'}
  for name, value in quiet.items():
    os.environ.setdefault(name, value)
  topology = topologies.get_topology_desc(platform='tpu', topology_name=TPUS[request.param])
  yield from compiler(topology, 'tpu', request.node.name)


@pytest.fixture
def compile_for_hopper(request, tmp_path, monkeypatch):
  """compile_for_hopper(function, *arguments) -> jax.stages.Compiled for an H200 (sm_90a); see also `assembled`.

  A kernel of XLA or Triton that spills registers is refused.
  """
  pytest.importorskip('jax_cuda13_plugin', reason="needs the extra aot: pip install -e '.[aot]'")
  topology = topologies.get_topology_desc(platform='cuda', topology_name='h200', target_config=HOPPER, topology='1x1x1')
  monkeypatch.setenv('MOSAIC_GPU_DUMP_TO', str(tmp_path))
  yield from compiler(topology, 'cuda', request.node.name, {'xla_gpu_fail_ptx_compilation_on_register_spilling': True})


class Assembled(NamedTuple):
  """A Mosaic GPU kernel as machine code."""

  ptx: str
  registers: int  # of a thread
  spilled: int  # bytes of a thread, stored and loaded


@pytest.fixture
def assembled(tmp_path):
  """assembled() -> {name: Assembled} of the Mosaic kernels that `compile_for_hopper` has compiled in this test."""
  def read(said):
    numbers = lambda pattern: sum(map(int, re.findall(pattern, said.read_text())))
    spilled = numbers(r'(\d+) bytes spill stores') + numbers(r'(\d+) bytes spill loads')
    return Assembled(said.with_suffix('.ptx').read_text(), numbers(r'Used (\d+) registers'), spilled)

  return lambda: {said.stem: read(said) for said in sorted(tmp_path.glob('*.ptxas'))}


def compiler(topology, platform, name, options=None):
  """Yields the fixtures' function for one chip of the topology."""
  mesh = jax.sharding.Mesh(topology.devices[:1], ('chip',))
  here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def compile_(function, *arguments):
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # else the host's CPU is asked what kind of chip it is
      compiled = jax.jit(function).trace(*placed).lower(lowering_platforms=(platform,)).compile(options)
    print(f'{name}: {compiled.memory_analysis().temp_size_in_bytes / 2**20:,.0f} MiB of temporaries')
    return compiled

  jax.config.update('jax_disable_most_optimizations', False)  # what chips would run
  yield compile_
  jax.config.update('jax_disable_most_optimizations', True)
