"""The benchmark of kernels: what it refuses, that numerics come first, and what it writes down."""

import contextlib
import io
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
TINY = ['--heads=4,2,16,16', '--block=16', '--top_k=2', '--experts=16,8,4,2', '--rounds=2']


@pytest.fixture(scope='module')
def bench():
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / 'scripts')
    import bench_kernels

    patch.setattr(bench_kernels, 'ceilings', lambda o, rounds: {  # large products and streams: seconds
        'flops_per_second': {'median': 1e9}, 'bytes_per_second': {'median': 1e9},
    })  # fmt: skip
    yield bench_kernels


@pytest.fixture(scope='module')
def figures(bench, tmp_path_factory):
  """(what a small run prints, the file that it writes)."""
  output = tmp_path_factory.mktemp('results') / 'new' / 'kernels_cpu.json'
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    bench.main([*TINY, '--kernel=msa_decode', '--kernel=experts', '--shapes=64', f'--output={output}'])
  return printed.getvalue(), output


@pytest.mark.parametrize('flags, told', [
    (['--kernel=nonesuch'], "argument --kernel: invalid choice: 'nonesuch'"),
    (['--shapes=8q'], "argument --shapes: '8q' is no shape; 8k, 1M or 256@128k, up to 1M"),
    (['--shapes=2M'], "argument --shapes: '2M' is no shape"),
    (['--shapes=64@32'], "argument --shapes: '64@32' is no shape"),
    (['--kernel=lightning', '--shapes=8@64'], 'argument --shapes: lightning takes whole rows, not 8@64'),
    (['--heads=6,4,16,16'], 'argument --heads: 6 query heads do not divide among 4 key heads'),
    (['--heads=4,2,16'], "argument --heads: '4,2,16' is not 4 numbers with commas between"),
    (['--top_k=0'], "argument --top_k: '0' is not a positive whole number"),
    (['--dtype=float64'], "argument --dtype: invalid choice: 'float64'"),
    (['--experts=16,8,2,4'], 'argument --experts: 4 experts a token of 2'),
])  # fmt: skip
def test_bad_flags_end_in_one_line(bench, flags, told):
  with pytest.raises(SystemExit) as end:
    bench.parse(flags)
  assert str(end.value).startswith(f'error: {told}') and '\n' not in str(end.value)


def test_an_implementation_that_cannot_serve_ends_in_one_line(bench):
  with pytest.raises(SystemExit, match="^error: lightning: lightning implementation 'pallas' cannot be used here: .*$"):
    bench.main([*TINY, '--kernel=lightning', '--shapes=64', '--implementation=pallas'])


def test_a_run_prints_the_table_and_writes_where_it_ran(figures):
  printed, result = figures[0], json.loads(figures[1].read_text())
  assert re.search(r'^msa_decode +gather +1@64 .* times as fast as spans$', printed, re.MULTILINE)
  assert re.search(r'^experts +loop +64 .* times as fast as dense product$', printed, re.MULTILINE)
  assert result['device'] == 'cpu' and result['versions']['jax'] == jax.__version__
  assert re.fullmatch(r'\d{4}-\d\d-\d\d', result['date']) and result['load_average_before'] >= 0
  assert [check['error'] < check['tolerance'] for check in result['numerics']] == [True] * 3
  decode, experts = result['cases']
  ours, peer = decode['sides']['gather'], decode['sides']['spans']
  assert ours['flops'] == 2 * 2 * 16 * 64 + 4 * 4 * 16 * 32 and peer['flops'] == 4 * 4 * 16 * 64
  assert experts['sides']['loop']['flops'] == experts['sides']['dense product']['flops'] == 6 * 64 * 2 * 16 * 8
  assert ours['flops_per_second'] == pytest.approx(ours['flops'] / ours['seconds']['median'])
  ratio = decode['ratio']
  assert 0 < ratio['min'] <= ratio['median'] <= ratio['max']


def test_float8_index_heads_are_right_and_counted_as_bytes(bench, tmp_path):
  flags = ['--kernel=msa_decode', '--shapes=64', f'--output={tmp_path}/figures.json']
  bench.main([*TINY, *flags, '--index_dtype=float8_e4m3fn'])
  result = json.loads((tmp_path / 'figures.json').read_text())
  assert result['index_dtype'] == 'float8_e4m3fn' and result['dtype'] == 'float32'
  assert 'msa_decode' in {check['kernel'] for check in result['numerics']}
  decode = result['cases'][0]['sides']['gather']
  assert decode['bytes'] == (1 * 2 * 16 + 64 * 16) + 4 * (2 * 32 * 2 * 16 + 2 * 4 * 16)


def test_wrong_numbers_stop_before_anything_is_timed(bench, monkeypatch, tmp_path):
  right = bench.kernel_cases.sparse.select_blocks
  monkeypatch.setattr(bench.kernel_cases.sparse, 'select_blocks', lambda *a: jnp.minimum(right(*a), 0))
  monkeypatch.setattr(bench, 'measure', lambda *a: pytest.fail('timed'))
  with pytest.raises(SystemExit, match='^error: index, gather: off by .* nothing was timed$'):
    bench.main([*TINY, '--kernel=index', '--shapes=64', f'--output={tmp_path}/none.json'])
  assert not list(tmp_path.iterdir())


def test_a_shape_without_room_is_left_out_in_one_line(bench, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(bench, 'free_bytes', lambda device: 1000)
  bench.main([*TINY, '--kernel=index', '--shapes=64', f'--output={tmp_path}/figures.json'])
  left_out = json.loads((tmp_path / 'figures.json').read_text())['left_out']
  assert left_out == ['index gather 64: does not fit: 0.0 GiB of 0.0 GiB free']
  assert left_out[0] in capsys.readouterr().out


def test_keys_seen_are_those_of_the_oracle(bench):
  from mmx.kernels_pallas import reference

  N, b, k = 85, 16, 3
  q, key = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(1, N, 1, 8), (1, N, 8)]))
  segments = jnp.ones((1, N), jnp.int32)
  ids_Tk = np.asarray(reference.msa_select(q, key, segments, b, k))[0, :, 0]
  tokens_TkB = ids_Tk[..., None] * b + np.arange(b)
  seen_T = np.sum((ids_Tk[..., None] >= 0) & (tokens_TkB <= np.arange(N)[:, None, None]), axis=(1, 2))
  for queries in (1, 20, N):
    shape = bench.Shape(N, queries)
    assert bench.kernel_cases.keys_seen(shape, b, k) == seen_T[-queries:].sum()
    assert bench.kernel_cases.keys_seen(shape) == sum(range(N - queries + 1, N + 1))


def test_the_limits_are_the_papers(bench):
  import plot_kernels

  assert round(plot_kernels.flop_ratio(1 << 20), 2) == 28.44 and round(plot_kernels.flop_ratio(1 << 13), 1) == 1.9
  flops, moved = plot_kernels.work_ratios(1 << 20, 1)
  assert round(flops, 1) == 30.1 and round(moved, 1) == 7.9
  whole, _ = plot_kernels.work_ratios(1 << 20, 1 << 20)
  assert whole == pytest.approx(28.44, rel=0.01)  # exact counts: an own block is half seen on average


def test_the_page_shows_every_device_and_every_kernel_of_ours(figures):
  import plot_kernels

  cpu = json.loads(figures[1].read_text())
  gpu = cpu | {'device': 'gpu', 'device_kind': 'NVIDIA H200'}
  page = plot_kernels.page({figures[1]: cpu, figures[1].with_stem('kernels_h200'): gpu})
  for part in ('## Measured: NVIDIA H200', '## Measured: CPU', '1@64', 'kernels_h200.json', '`sparse_tpu.py` | TPU |'):
    assert part in page
  assert plot_kernels.figure([cpu, gpu]).startswith(b'\x89PNG')
