"""Against transformers and the safetensors library themselves: what we write they load, what they write we read."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import folders

from mmx.convert import safetensors_io
from mmx.convert.exporter import export_checkpoint
from mmx.convert.importer import import_checkpoint
from mmx.convert.verify import TOLERANCE, difference

pytestmark = pytest.mark.hf

ROOT = pathlib.Path(__file__).parents[2]
DUMPS = ROOT / 'tests/golden/parity'
CASES = sorted(path.name for path in DUMPS.iterdir())


def quiet(line):
  """Takes what import and export say."""


@pytest.mark.parametrize('case', CASES)
def test_an_exported_folder_loads_in_transformers_and_gives_equal_logits(case, tmp_path):
  """Imported and exported in three files: the reference was computed from the folder before."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  import_checkpoint(DUMPS / case, tmp_path / 'run', say=quiet)
  export_checkpoint(tmp_path / 'run', tmp_path / 'out', max_shard_bytes=50_000, say=quiet)
  model, told = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'out', attn_implementation='eager', experts_implementation='eager', output_loading_info=True)
  buffers = {name for name, _ in model.named_buffers()}
  assert not told['unexpected_keys'] and not told['mismatched_keys']
  decays = ('slope_rate', 'query_decay', 'key_decay', 'diagonal_decay')  # computed anew by transformers
  assert {name for name in told['missing_keys'] if not name.endswith(decays)} == set(), buffers
  with np.load(DUMPS / case / 'reference.npz') as reference:
    with torch.no_grad():
      logits = model.eval()(torch.tensor(reference['tokens'], dtype=torch.long)).logits.numpy()
    found = difference(logits, reference['logits'])
  print(f'{case}: {found}')
  assert found.relative < 1e-6 and found.same_argmax == 1


@pytest.mark.parametrize('name', folders.FAMILIES)
def test_transformers_loads_the_bfloat16_export(name, tmp_path):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  folders.write(tmp_path / 'hf', folders.FAMILIES[name], folders.model(name))
  import_checkpoint(tmp_path / 'hf', tmp_path / 'run', say=quiet)
  export_checkpoint(tmp_path / 'run', tmp_path / 'out', 'bfloat16', say=quiet)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', experts_implementation='eager')
  assert model.dtype == torch.bfloat16
  assert torch.isfinite(model(torch.zeros((1, 9), dtype=torch.long)).logits).all()


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path):
  library = pytest.importorskip('safetensors')
  torch = pytest.importorskip('torch')
  from safetensors.torch import load_file, save_file

  random = np.random.default_rng(0)
  arrays = {'a.weight': random.normal(size=(5, 7)).astype(np.float32), 'b': np.float32(3.5).reshape(())}
  folders.write_arrays(tmp_path / 'ours', arrays)
  loaded = load_file(tmp_path / 'ours' / safetensors_io.SINGLE)
  assert loaded.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(loaded[name].numpy(), array)
  with library.safe_open(tmp_path / 'ours' / safetensors_io.SINGLE, 'np') as opened:
    assert opened.metadata() == {'format': 'pt'}

  theirs = {
      'half': torch.randn(3, 4).to(torch.bfloat16), 'eighth': torch.randn(4, 6).to(torch.float8_e4m3fn),
      'eighth_scale_inv': torch.rand(1, 1), 'short': torch.randn(2).to(torch.float16), 'whole': torch.arange(3),
  }
  (tmp_path / 'theirs').mkdir()
  save_file(theirs, tmp_path / 'theirs' / safetensors_io.SINGLE)
  stored = safetensors_io.read_index(tmp_path / 'theirs')
  assert stored.keys() == theirs.keys() and stored['whole'].code == 'I64'
  for name in ('half', 'short', 'eighth_scale_inv'):
    np.testing.assert_array_equal(safetensors_io.read(stored, name), theirs[name].float().numpy())
  wanted = theirs['eighth'].float() * theirs['eighth_scale_inv']
  np.testing.assert_array_equal(safetensors_io.read(stored, 'eighth'), wanted.numpy())


def test_the_script_writes_the_dumps_again(tmp_path):
  """Names, shapes and logits; the last bits of a product depend on the machine."""
  cases = ['m2_float8', 'text01_lightning_3_full_1', 'm3_groups_of_4_whole_blocks_released_names']
  script = [sys.executable, ROOT / 'scripts/make_parity_dumps.py', f'--output={tmp_path}', f'--only={",".join(cases)}']
  subprocess.run(script, check=True, capture_output=True)
  for case in cases:
    new, kept = tmp_path / case, DUMPS / case
    assert {file.name for file in new.iterdir()} == {file.name for file in kept.iterdir()}
    fields = [json.loads((folder / 'config.json').read_text()) for folder in (new, kept)]
    assert fields[0] == fields[1] | {'transformers_version': fields[0]['transformers_version']}
    stored = [safetensors_io.read_index(folder) for folder in (new, kept)]
    assert stored[0].keys() == stored[1].keys()
    for name in stored[0]:
      np.testing.assert_array_equal(*(safetensors_io.read(index, name, (16, 16)) for index in stored), err_msg=name)
    with np.load(new / 'reference.npz') as one, np.load(kept / 'reference.npz') as other:
      np.testing.assert_array_equal(one['tokens'], other['tokens'])
      assert difference(one['logits'], other['logits']).relative < TOLERANCE
