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
