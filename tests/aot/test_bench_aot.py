"""The benchmark of kernels on chips that are not here: what it would run there compiles, at what it would be run at."""

import pathlib

import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parents[2]
KERNELS = (
    'attention', 'attention_train', 'msa_prefill', 'msa_decode', 'msa_train', 'index', 'lightning', 'experts',
    'experts_train',
)


@pytest.fixture
def bench(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / 'scripts')
  import bench_kernels

  assert set(KERNELS) == set(bench_kernels.KERNELS)
  return bench_kernels


def compiled(bench, kernel, platform, compile_):
  """Names of what was compiled: our form of the platform, and its peers, at the shape of the check and the shortest."""
  o = bench.Options(platform, jnp.dtype('bfloat16'), bench.M3_HEADS, 128, 16, bench.M2_EXPERTS)
  shape = bench.Shape(*bench.ACCELERATOR_SHAPES[kernel][0])
  (name,) = bench.choose(kernel, shape, [], o)
  few, odd, case = bench.checked(kernel, name, o)
  compile_(case.ours(name).function, bench.abstract(case.arguments, few))
  case = bench.KERNELS[kernel](o, shape)
  sides = [case.ours(name), *(peer for peer in case.peers if peer.name != name and not bench.torch_side(peer))]
  arguments = bench.abstract(case.arguments, o)
  arguments |= bench.jax.eval_shape(case.derived, arguments)
  for side in sides:
    compile_(side.function, arguments)
  return [side.name for side in sides]


@pytest.mark.parametrize('kernel', KERNELS)
def test_what_it_runs_on_hopper_compiles(kernel, bench, compile_for_hopper):
  assert compiled(bench, kernel, 'gpu', compile_for_hopper)[0] == 'hopper'


@pytest.mark.parametrize('kernel', KERNELS)
def test_what_it_runs_on_tpu_compiles(kernel, bench, compile_for_tpu):
  ours = 'megablox' if kernel.startswith('experts') else 'pallas'
  assert compiled(bench, kernel, 'tpu', compile_for_tpu)[0] == ours
