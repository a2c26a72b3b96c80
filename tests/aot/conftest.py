"""Compiles for accelerators that are not here: `pip install -e '.[test,aot]' && pytest -m aot`."""

import re
from typing import NamedTuple

import jax
import pytest

from mmx import topology

TPUS = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}


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
  yield from compiler(TPUS[request.param], 'tpu', request.node.name)


@pytest.fixture
def compile_for_hopper(request, tmp_path, monkeypatch):
  """compile_for_hopper(function, *arguments) -> jax.stages.Compiled for an H200 (sm_90a); see also `assembled`.

  A kernel of XLA or Triton that spills registers is refused.
  """
  pytest.importorskip('jax_cuda13_plugin', reason="needs the extra aot: pip install -e '.[aot]'")
  monkeypatch.setenv('MOSAIC_GPU_DUMP_TO', str(tmp_path))
  refuse_spills = {'xla_gpu_fail_ptx_compilation_on_register_spilling': True}
  yield from compiler('h200:1x8', 'cuda', request.node.name, refuse_spills)


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


def compiler(slice_name, platform, name, options=None):
  """Yields the fixtures' function for one chip of the slice."""
  mesh = jax.sharding.Mesh(topology.devices_of(slice_name)[:1], ('chip',))
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
