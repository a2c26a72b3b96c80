"""The compiler's static schedule of the TPU kernels: shares of the matrix units, by scripts/tpu_schedule.py."""

import importlib
import pathlib

import pytest


@pytest.fixture
def tpu_schedule(monkeypatch):
  pytest.importorskip('libtpu', reason="needs the extra aot: pip install -e '.[aot]'")
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / 'scripts')  # of the child process too
  return importlib.import_module('tpu_schedule')


@pytest.mark.parametrize('kernel', ['msa_attend_blocks', 'msa_attend_blocks_backward'])
@pytest.mark.parametrize('chip', ['v5p', 'v6e'])
def test_attention_over_blocks_fills_30_percent_of_the_matrix_units(tpu_schedule, kernel, chip):
  report = tpu_schedule.schedule(kernel, chip)
  assert report['share'] >= 0.3
  assert report['share'] == report['ideal'] / report['bundles']


def test_a_naive_step_of_few_rows_fills_less(tpu_schedule):
  """The measure tells a kernel of 64 rows a step from one of 512: it does not count the products alone."""
  assert tpu_schedule.schedule('msa_attend_blocks_64', 'v5p')['share'] < 0.2
