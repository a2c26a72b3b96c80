"""The compiler's static schedule of the TPU kernels: shares of the matrix units, by scripts/tpu_schedule.py."""

import functools
import importlib
import pathlib
import re

import pytest


@pytest.fixture
def tpu_schedule(monkeypatch):
  pytest.importorskip('libtpu', reason="needs the extra aot: pip install -e '.[aot]'")
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / 'scripts')  # of the child process too
  return importlib.import_module('tpu_schedule')


# v6e's units are four times as large: a query's heads are then too few rows for what each of them waits for.
@pytest.mark.parametrize('kernel, chip, least', [
    ('msa_attend_blocks', 'v5p', 0.45), ('msa_attend_blocks', 'v6e', 0.3), ('msa_attend_blocks_backward', 'v5p', 0.4),
    ('msa_attend_blocks_backward', 'v6e', 0.25),
])
def test_attention_over_blocks_fills_the_matrix_units(tpu_schedule, kernel, chip, least):
  report = tpu_schedule.schedule(kernel, chip)
  assert report['share'] >= least
  assert report['share'] == report['ideal'] / report['bundles']
  assert report['bundles'] <= report['cycles'] <= report['most cycles']


# Less on v6e: forward, exponentials and sums hold its larger units up.
@pytest.mark.parametrize('kernel, chip, least', [
    ('attend', 'v5p', 0.85), ('attend', 'v6e', 0.65), ('attend_backward', 'v5p', 0.9), ('attend_backward', 'v6e', 0.85),
])
def test_full_attention_fills_the_matrix_units(tpu_schedule, kernel, chip, least):
  report = tpu_schedule.schedule(kernel, chip)
  assert report['ideal'] / report['cycles'] >= least


@pytest.mark.parametrize('chip', ['v5p', 'v6e'])
def test_full_attention_and_its_gradients_take_fewer_cycles_than_splash(tpu_schedule, chip):
  """Of 1024 queries of a head and 1024 keys."""
  cycles = lambda kernel, steps: steps * tpu_schedule.schedule(kernel, chip)['cycles']
  assert cycles('attend', 2) < 0.75 * cycles('splash', 1)
  assert cycles('attend_backward', 2) < 0.6 * (cycles('splash_dq', 4) + cycles('splash_dkv', 4))


def test_a_naive_step_of_few_rows_fills_less(tpu_schedule):
  """The measure tells a kernel of 2 queries a tile from one of 32: it does not count the products alone."""
  assert tpu_schedule.schedule('msa_attend_blocks_2', 'v5p')['share'] < 0.2


def test_what_xla_makes_around_the_kernel_costs_less_than_the_kernel(tpu_schedule):
  """And gathers or scatters no elements, of which a plan once consisted: libtpu states no cycles for those."""
  tokens, chip = 2**17, 'v5p'
  make = functools.partial(tpu_schedule.sorted_pairs, tokens, tpu_schedule.chunk(tokens, chip)[0])
  found, text = tpu_schedule.schedule_files(make, chip)
  assert any(name.startswith('sort') for name in found) and not re.search(r'\b(gather|scatter)\(', text)
  assert tpu_schedule.sorting(tokens, chip)[0] < 0.2 * tpu_schedule.blocks(tokens, chip)[0]
