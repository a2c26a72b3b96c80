"""The safetensors format, a tensor at a time: 8 bytes of header length, a JSON header, the raw little-endian values.

Quantised release checkpoints keep a matrix as float8 (e4m3) and its scales, one for each block of 128 x 128, in a
second tensor: `NAME_scale_inv`, by which the block is multiplied.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from mmx.config import ConfigError

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
DTYPES = {
    'F32': np.dtype(np.float32), 'BF16': np.dtype(ml_dtypes.bfloat16), 'F16': np.dtype(np.float16),
    'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn), 'F64': np.dtype(np.float64),
    'I64': np.dtype(np.int64), 'I32': np.dtype(np.int32), 'U8': np.dtype(np.uint8), 'BOOL': np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
QUANTISED = 'F8_E4M3'
READABLE = ('F32', 'BF16', 'F16')  # and quantised matrices; a float32 holds each value of these exactly
SCALE_SUFFIX = '_scale_inv'
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
  """Where a tensor lies."""

  file: pathlib.Path
  code: str  # a key of DTYPES, or a dtype we cannot read
  shape: tuple[int, ...]
  offset: int  # bytes from the beginning of the file


def read_index(folder: pathlib.Path) -> dict[str, Stored]:
  """{name: where it lies} of model.safetensors, or of all shards that model.safetensors.index.json names.

  Raises:
    ConfigError: no safetensors here, a shard that is absent or damaged, or a tensor that is not in the shard named.
  """
  index = folder / INDEX
  if not index.exists():
    if not (folder / SINGLE).exists():
      raise ConfigError(f'{folder}: neither {INDEX} nor {SINGLE} here')
    return _read_header(folder / SINGLE)
  try:
    shard_of = json.loads(index.read_text())['weight_map']
  except (ValueError, KeyError, TypeError):
    raise ConfigError(f'{index}: no weight_map that can be read') from None
  absent = sorted({shard for shard in shard_of.values() if not (folder / shard).exists()})
  if absent:
    raise ConfigError(f'{folder}: lacks {len(absent)} of {len(set(shard_of.values()))} shards: {", ".join(absent)}')
  found = {}
  for shard in sorted(set(shard_of.values())):
    found |= _read_header(folder / shard)
  lost = [name for name in shard_of if name not in found]
  if lost:
    raise ConfigError(f'{index}: {lost[0]} is not in {shard_of[lost[0]]} (and so with {len(lost)} tensors in all)')
  return found


def _read_header(file: pathlib.Path) -> dict[str, Stored]:
  size = file.stat().st_size
  with file.open('rb') as opened:
    length = int.from_bytes(opened.read(8), 'little')
    if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
      raise ConfigError(f'{file}: damaged, or no safetensors: its header would be {length:,} bytes of {size:,}')
    try:
      header = json.loads(opened.read(length))
      header.pop('__metadata__', None)
      tensors = {
          name: (Stored(file, one['dtype'], tuple(one['shape']), 8 + length + one['data_offsets'][0]), one)
          for name, one in header.items()
      }
    except (ValueError, KeyError, TypeError, AttributeError):
      raise ConfigError(f'{file}: damaged, or no safetensors: the header cannot be read') from None
  for name, (stored, one) in tensors.items():
    begin, end = one['data_offsets']
    if 8 + length + end > size:
      raise ConfigError(f'{file}: cut off: {name} would end at byte {8 + length + end:,} of {size:,}')
    if stored.code in DTYPES and end - begin != math.prod(stored.shape) * DTYPES[stored.code].itemsize:
      raise ConfigError(f'{file}: damaged: {name} has {end - begin:,} bytes for {stored.code} {list(stored.shape)}')
  return {name: stored for name, (stored, _) in tensors.items()}


def read(tensors: Mapping[str, Stored], name: str, block: tuple[int, int] = (128, 128)) -> np.ndarray:
  """One tensor in float32, its blocks of `block` entries scaled if it is quantised.

  The file is read, not mapped: pages of a mapping would count, and add up, as this process's memory.
  """
  stored = tensors[name]
  raw = np.fromfile(stored.file, DTYPES[stored.code], math.prod(stored.shape), offset=stored.offset)
  values = raw.astype(np.float32, copy=False).reshape(stored.shape)
  if stored.code == QUANTISED:
    scales = read(tensors, name + SCALE_SUFFIX)
    for row in range(scales.shape[0]):  # a row of blocks at a time, so that scales are never as large as the matrix
      rows = slice(row * block[0], (row + 1) * block[0])
      values[rows] *= np.repeat(scales[row], block[1])[None, : values.shape[1]]
  return values


def scale_shape(shape: tuple[int, int], block: tuple[int, int] = (128, 128)) -> tuple[int, int]:
  """Shape of the scales of a quantised matrix; blocks at the edges may be smaller."""
  return -(-shape[0] // block[0]), -(-shape[1] // block[1])


# --- writing ----------------------------------------------------------------------------------------------------------


def write(
    folder: pathlib.Path, tensors: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype],
    values: Iterator[np.ndarray], max_shard_bytes: int,
) -> list[str]:
  """Writes tensors in their order, of which only one is in memory at a time; returns the names of the files.

  tensors: {name: shape}. dtypes: {name: dtype on disk}. values: an array for each, cast as it is written.
  max_shard_bytes: of the values in one file; a single tensor may exceed it. One file has no index, several have.
  """
  shards: list[list[str]] = [[]]
  filled = 0
  sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in tensors.items()}
  for name, size in sizes.items():
    if shards[-1] and filled + size > max_shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += size
  files = [f'model-{i:05d}-of-{len(shards):05d}.safetensors' for i in range(1, len(shards) + 1)]
  files = files if len(files) > 1 else [SINGLE]
  for file, names in zip(files, shards, strict=True):
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    for name in names:
      header[name] = {
          'dtype': CODES[dtypes[name]], 'shape': list(tensors[name]), 'data_offsets': [offset, offset + sizes[name]]
      }
      offset += sizes[name]
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # values begin at a multiple of 8 bytes
    with (folder / file).open('wb') as opened:
      opened.write(len(text).to_bytes(8, 'little') + text)
      for name in names:
        array = next(values)
        assert array.shape == tensors[name], (name, array.shape, tensors[name])
        np.ascontiguousarray(array, dtypes[name]).tofile(opened)
  if len(files) > 1:
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
  return files
