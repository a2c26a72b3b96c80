"""`python -m mmx.aot` on small models and real slices."""

import dataclasses
import json
import math
import re

import pytest

import tiny
from mmx import aot, config

SMALL = dict(
    model__d_model=256, model__vocab_size=512, model__attention__num_heads=4, model__attention__num_kv_heads=2,
    model__attention__head_dim=128, model__attention__rotary_dim=64, model__moe__d_ff=128, model__pattern='full*3',
    model__compute_dtype='bfloat16', data__seq_len=256, data__batch_size=8,
)


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'small.gin'
  path.write_text(config.dump(tiny.experiment(mesh__num_devices=0, mesh__fsdp=2, mesh__expert=2, **SMALL)))
  return path


def test_a_small_model_on_four_chips_is_proved_and_recorded(file, tmp_path, capsys):
  aot.main([f'--config={file}', '--topology=v5e:2x2', f'--json={tmp_path}/out.json'])
  told = capsys.readouterr().out
  assert 'v5e:2x2: 4 chips, mesh fsdp 2 x expert 2' in told and 'predicted' in told
  found = json.loads((tmp_path / 'out.json').read_text())
  assert found['chips'] == 4 and 0 < found['peak'] < found['memory']
  kinds = {c['kind']: c for c in found['collectives']}
  assert {'all-gather', 'all-reduce'} <= set(kinds)
  assert any(c['count'] >= 3 for c in found['collectives'])  # once a layer
  assert 0 < found['utilisation']['most'] <= found['utilisation']['least'] <= 1


def test_what_needs_more_than_a_chip_has_is_told_and_refused_whatever_the_compiler_says(file, monkeypatch, capsys):
  prove = aot.prove
  monkeypatch.setattr(aot, 'prove', lambda *args: dataclasses.replace(prove(*args), memory=2**20))
  with pytest.raises(SystemExit) as stopped:
    aot.main([f'--config={file}', '--topology=v5e:2x2'])
  first, *ways = str(stopped.value.code).splitlines()
  assert re.fullmatch(r'error: --topology=v5e:2x2: [\d.]+ GiB at once, a chip has 0.0', first) and ways
  assert 'predicted' in capsys.readouterr().out


@pytest.mark.parametrize('mode, tokens', [('prefill', 8 * 256), ('decode', 8)])
def test_a_step_of_serving_is_proved_with_every_kind_of_cache(file, tmp_path, mode, tokens):
  sets = [f'--set={path}' for path in ('model.pattern=lightning full msa', 'model.msa.index_dim=64', 'mesh.fsdp=1',
                                       'mesh.tensor=2')]
  aot.main([f'--config={file}', '--topology=v5e:2x2', f'--mode={mode}', f'--json={tmp_path}/out.json', *sets])
  found = json.loads((tmp_path / 'out.json').read_text())
  assert (found['mode'], found['tokens']) == (mode, tokens)
  assert 0 < found['arguments'] < found['peak'] < found['memory']
  assert 0 < found['utilisation']['most'] <= 1


def test_the_mesh_that_is_found_is_the_fastest_of_those_that_fit(file, capsys):
  aot.main([f'--config={file}', '--topology=v5e:2x2', '--find', '--set=data.batch_size=4', '--set=data.seq_len=128'])
  told = capsys.readouterr()
  tried = [line for line in told.err.splitlines() if line.startswith('[')]
  times = [float(re.search(r' to ([\d.]+) s', line)[1]) for line in tried if ' to ' in line]
  assert len(tried) == len(set(line.split('] ')[1].split(':')[0] for line in tried)) >= 6 and times
  assert 'v5e:2x2: 4 chips, mesh ' in told.out and 'predicted' in told.out


def test_meshes_are_products_of_sides_that_divide_the_experiment():
  small = tiny.experiment(mesh__num_devices=0, **SMALL)
  found = {tuple(getattr(e.mesh, axis) for axis in aot.FOUND_AXES) for e in aot.meshes(small, 'v5p:2x2x4', 'train')}
  assert (16, 1, 1, 1) not in found  # 8 rows
  assert {(4, 2, 2, 1), (2, 4, 1, 2), (1, 1, 2, 8)} <= found
  assert all(math.prod(sizes) == 16 for sizes in found)
  served = aot.meshes(small, 'v5p:2x2x4', 'decode')
  assert all(experiment.mesh.context == 1 for experiment in served)


def test_what_does_not_fit_is_refused_with_what_would_help(file):
  large = ['--set=data.batch_size=65536', '--set=data.seq_len=2048', '--set=model.remat=none']
  with pytest.raises(SystemExit) as stopped:
    aot.main([f'--config={file}', '--topology=v5e:2x2', *large])
  first, *more = stopped.value.code.splitlines()
  assert first.startswith('error: --topology=v5e:2x2: ') and 'memory' in first
  assert '--set model.remat=full' in more[0]


@pytest.mark.parametrize('more, said', [
    (['--topology=v9:2x2'], "unknown chip 'v9'"), (['--topology=v5e:2x2', '--set=mesh.fsdp=3'], 'mesh'),
    (['--topology=v5p:4x4x8', '--set=data.batch_size=128', '--set=mesh.expert=1', '--set=mesh.replica=2',
      '--set=mesh.fsdp=64'], 'cannot be laid on it'),
])
def test_bad_input_ends_in_one_line(file, more, said):
  with pytest.raises(SystemExit) as stopped:
    aot.main([f'--config={file}', *more])
  assert stopped.value.code.startswith('error: ') and said in stopped.value.code and '\n' not in stopped.value.code
