"""The file format: what is written is read, in any number of files, and a damaged file says so in one line."""

import json

import ml_dtypes
import numpy as np
import pytest

import folders

from mmx.config import ConfigError
from mmx.convert import safetensors_io
from mmx.convert.safetensors_io import INDEX, SINGLE

RANDOM = np.random.default_rng(0)
ARRAYS = {
    'matrix': RANDOM.normal(size=(7, 5)).astype(np.float32),
    'half': RANDOM.normal(size=(3, 2, 4)).astype(ml_dtypes.bfloat16),
    'scalar': np.array(2.5, np.float32),
    'empty': np.zeros((0, 3), np.float32),
    'short': RANDOM.normal(size=9).astype(np.float16),
}


@pytest.mark.parametrize('max_shard_bytes, files', [(10**6, 1), (150, 2), (1, 5)])
def test_what_is_written_is_read(tmp_path, max_shard_bytes, files):
  folders.write_arrays(tmp_path, ARRAYS, max_shard_bytes)
  found = safetensors_io.read_index(tmp_path)
  assert len(list(tmp_path.glob('*.safetensors'))) == files
  assert (tmp_path / INDEX).exists() == (files > 1)
  assert found.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    read = safetensors_io.read(found, name)
    assert read.dtype == np.float32 and read.shape == array.shape
    np.testing.assert_array_equal(read, array.astype(np.float32))


def test_a_file_holds_no_more_than_asked_unless_one_tensor_does(tmp_path):
  arrays = {f'a{i}': np.zeros(size, np.float32) for i, size in enumerate((10, 10, 30, 5, 5, 5))}
  folders.write_arrays(tmp_path, arrays, max_shard_bytes=80)
  index = json.loads((tmp_path / INDEX).read_text())
  held = {}
  for name, file in index['weight_map'].items():
    held.setdefault(file, []).append(name)
  assert list(held.values()) == [['a0', 'a1'], ['a2'], ['a3', 'a4', 'a5']]
  assert index['metadata']['total_size'] == 4 * 65


@pytest.mark.parametrize('shape, block', [((128, 256), (128, 128)), ((200, 130), (128, 128)), ((5, 9), (2, 4))])
def test_each_block_of_float8_has_its_scale(tmp_path, shape, block):
  """Against a loop over entries; blocks at the edges are cut."""
  quantised = RANDOM.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
  scales = RANDOM.uniform(0.5, 2, safetensors_io.scale_shape(shape, block)).astype(np.float32)
  folders.write_arrays(tmp_path, {'w.weight': quantised, 'w.weight_scale_inv': scales})
  found = safetensors_io.read(safetensors_io.read_index(tmp_path), 'w.weight', block)
  wanted = np.zeros(shape, np.float32)
  for i in range(shape[0]):
    for j in range(shape[1]):
      wanted[i, j] = np.float32(quantised[i, j]) * scales[i // block[0], j // block[1]]
  np.testing.assert_array_equal(found, wanted)


def cut(folder):
  path = folder / SINGLE
  path.write_bytes(path.read_bytes()[:-10])


def scribble(folder):
  (folder / SINGLE).write_bytes(b'no safetensors at all, but text')


def mangle(folder):
  path = folder / SINGLE
  data = path.read_bytes()
  path.write_bytes(data[:8] + b'!' + data[9:])


def reshape(folder):
  path = folder / SINGLE
  path.write_bytes(path.read_bytes().replace(b'[7,5]', b'[7,6]'))


def remove(folder):
  (folder / SINGLE).unlink()


@pytest.mark.parametrize('damage, message', [
    (cut, r'model.safetensors: cut off: short would end at byte [\d,]+ of [\d,]+$'),
    (scribble, 'damaged, or no safetensors: its header would be'),
    (mangle, 'the header cannot be read'),
    (reshape, r'damaged: matrix has 140 bytes for F32 \[7, 6\]'),
    (remove, 'neither model.safetensors.index.json nor model.safetensors here'),
])
def test_a_damaged_file_says_so(tmp_path, damage, message):
  folders.write_arrays(tmp_path, ARRAYS)
  damage(tmp_path)
  with pytest.raises(ConfigError, match=message) as told:
    safetensors_io.read_index(tmp_path)
  assert '\n' not in str(told.value)


def test_shards_that_lack_say_so(tmp_path):
  folders.write_arrays(tmp_path, ARRAYS, max_shard_bytes=1)
  index = json.loads((tmp_path / INDEX).read_text())
  index['weight_map']['stray'] = 'model-00001-of-00005.safetensors'
  (tmp_path / INDEX).write_text(json.dumps(index))
  with pytest.raises(ConfigError, match='stray is not in model-00001-of-00005.safetensors'):
    safetensors_io.read_index(tmp_path)
  for shard in (2, 4):
    (tmp_path / f'model-0000{shard}-of-00005.safetensors').unlink()
  with pytest.raises(ConfigError, match='lacks 2 of 5 shards: model-00002-of-00005.safetensors, model-00004'):
    safetensors_io.read_index(tmp_path)
  (tmp_path / INDEX).write_text('{"weight_map": 3')
  with pytest.raises(ConfigError, match='no weight_map that can be read'):
    safetensors_io.read_index(tmp_path)
