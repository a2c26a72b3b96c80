"""The dumps of tests/golden/parity: logits that transformers computed, from random weights of every family.

`scripts/make_parity_dumps.py` writes them; tests/convert/test_transformers.py holds them against transformers again.
"""

import pathlib
import re
import shutil

import numpy as np
import pytest

from mmx.convert import __main__ as command, families, importer, safetensors_io
from mmx.convert.verify import TOLERANCE, verify

DUMPS = pathlib.Path(__file__).parents[1] / 'golden/parity'
CASES = sorted(path.name for path in DUMPS.iterdir())
ONE = {'mesh.num_devices': 1}


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_transformers(case):
  found = verify(DUMPS / case, DUMPS / case / 'reference.npz', ONE)
  print(f'{case}: {found}')
  assert found.relative < TOLERANCE
  assert found.same_argmax == 1


def test_every_family_has_several_shapes():
  """What the dumps must hold for the test above to mean something."""
  configs = [(families.read_config(DUMPS / case), DUMPS / case) for case in CASES]
  for family in families.FAMILIES:
    assert sum(one is family for (one, _), _ in configs) >= 2
  seen = set()
  for (_, fields), folder in configs:
    T = np.load(folder / 'reference.npz')['tokens'].shape[1]
    seen.add(('groups of 1', fields['model.attention.num_heads'] == fields['model.attention.num_kv_heads']))
    if 'msa' in fields['model.pattern']:
      blocks = -(-T // fields['model.msa.block_size'])
      seen.add(('k below blocks', fields['model.msa.top_k'] < blocks))
      seen.add(('cut block', T % fields['model.msa.block_size'] > 0))
      seen.add(('mixed layers', 'full' in fields['model.pattern'] and 'dense' in fields['model.pattern']))
  for what in ('groups of 1', 'k below blocks', 'cut block', 'mixed layers'):
    assert (what, True) in seen and (what, False) in seen, what
  assert any(one.code == 'F8_E4M3' for _, folder in configs for one in safetensors_io.read_index(folder).values())


def test_a_run_folder_and_a_mesh_give_the_same(tmp_path):
  folder = DUMPS / 'm2_groups_of_2'
  importer.import_checkpoint(folder, tmp_path / 'run', say=lambda line: None)
  eight = {'mesh.fsdp': 2, 'mesh.expert': 2, 'mesh.tensor': 2}
  for place, overrides in ((tmp_path / 'run', ONE), (folder, eight)):
    assert verify(place, folder / 'reference.npz', overrides).relative < TOLERANCE


def test_the_command_prints_the_difference_and_fails_above_the_tolerance(tmp_path, capsys):
  folder = tmp_path / 'spoilt'
  shutil.copytree(DUMPS / 'm2_groups_of_1_whole_head_rotates', folder)
  line = ['verify', str(folder), '--reference', str(folder / 'reference.npz'), '--set', 'mesh.num_devices=1']
  assert command.main(line) == 0
  said = capsys.readouterr().out
  assert re.search(r'absolute difference \d\.\d+e-\d+, relative .* 100\.0000% of positions: within the tolerance', said)
  assert command.main([*line, '--tolerance', '1e-9']) == 1
  reference = dict(np.load(folder / 'reference.npz'))
  reference['logits'][0, 3, 5] += 0.01
  np.savez(folder / 'reference.npz', **reference)
  capsys.readouterr()
  assert command.main(line) == 1
  said = capsys.readouterr().out
  assert 'maximum absolute difference 1.000e-02' in said and 'above the tolerance of 2e-05' in said
  reference['logits'][0, 3, 5] = np.nan
  np.savez(folder / 'reference.npz', **reference)
  assert command.main(line) == 1
