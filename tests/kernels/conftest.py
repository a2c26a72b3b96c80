"""What the tests of simulated Hopper kernels share."""

import threading

import jax
import pytest


@pytest.fixture(scope='module')
def compiled_once():
  """The simulator compiles a kernel again for every thread of every program. Once is enough, and 10 times as fast."""
  from jax._src.pallas.mosaic.interpret import thread_map

  compiled, lock = {}, threading.Lock()

  def run(jaxpr, consts, *args):
    with lock:
      if jaxpr not in compiled:
        evaluate = lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args) and None
        compiled[jaxpr] = jax.jit(evaluate).lower(consts, *args).compile()
    compiled[jaxpr](consts, *args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(thread_map, '_run_jaxpr', run)
    yield


@pytest.fixture
def races(monkeypatch):
  """races() -> whether the simulator saw one in any kernel of this test. It keeps those of the last kernel itself."""
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

  name = next(name for name in ('GPURaceDetectionState', 'RaceDetectionState') if hasattr(gpu_callbacks, name))
  make, kept = getattr(gpu_callbacks, name), []

  def keep(**options):
    kept.append(make(**options))
    return kept[-1]

  def found():
    assert kept, 'no kernel was simulated'
    return any(state.races_found for state in kept)

  monkeypatch.setattr(gpu_callbacks, name, keep)
  return found
