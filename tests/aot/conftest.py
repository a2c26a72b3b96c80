"""Compiles for accelerators that are not here: `pip install -e '.[test,aot]' && pytest -m aot`."""

import os

import jax
import pytest
from jax.experimental import topologies

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
  # No chip and no metadata server is asked, and several processes may compile at a time.
  quiet = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
           'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_MIN_LOG_LEVEL': '3', 'TPU_STDERR_LOG_LEVEL': '3'}
  for name, value in quiet.items():
    os.environ.setdefault(name, value)
  topology = topologies.get_topology_desc(platform='tpu', topology_name=TPUS[request.param])
  mesh = jax.sharding.Mesh(topology.devices[:1], ('chip',))
  here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def compile_(function, *arguments):
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # else libtpu asks the host's CPU what kind of chip it is
      compiled = jax.jit(function).trace(*placed).lower(lowering_platforms=('tpu',)).compile()
    print(f'{request.node.name}: {compiled.memory_analysis().temp_size_in_bytes / 2**20:,.0f} MiB of temporaries')
    return compiled

  jax.config.update('jax_disable_most_optimizations', False)  # what chips would run
  yield compile_
  jax.config.update('jax_disable_most_optimizations', True)
