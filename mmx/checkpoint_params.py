"""Parameters of a checkpoint without the rest of its state: read into any placement, read and written slice by slice.

A checkpoint of training and one that `mmx.convert` wrote look alike from here: mmx/checkpoint.py describes the folder.
Arrays are zarr, so TensorStore reads and writes any part of one; Orbax reads both kinds as well.
"""

import collections
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import linen as nn

from mmx import checkpoint, sharding
from mmx.checkpoint import CheckpointError
from mmx.config import ModelConfig
from mmx.model import init_variables

COLLECTIONS = ('params', 'router')  # of the saved state, what a model is applied to
OPTIONAL = 'params/mtp_'  # modules that only training needs: a model without them may leave them in the checkpoint
SHOWN = 8  # names in one message
IN_FLIGHT = 4  # pieces on their way to the disk


def abstract_variables(model: ModelConfig, mesh=None) -> Any:
  """{'params': ..., 'router': ...} of jax.ShapeDtypeStruct, placed on a mesh if one is given; nothing is computed."""
  boxed = _boxed_variables(model)
  if mesh is None:
    return nn.unbox(boxed)
  place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  return jax.tree.map(place, nn.unbox(boxed), sharding.tree_shardings(boxed, mesh))


@functools.cache  # tracing takes a second where there are many kinds of layers
def _boxed_variables(model: ModelConfig) -> Any:
  return jax.eval_shape(lambda: init_variables(model, None, jax.random.key(0)))


def restore_params(folder: str | os.PathLike, abstract_variables: Any, default: Any = None) -> tuple[Any, list[str]]:
  """Parameters and expert biases of the newest whole checkpoint of a run folder, or of an imported one.

  abstract_variables: {'params': ..., 'router': ...} of jax.ShapeDtypeStruct, with the shardings they are to have; the
    rest of a training state is not read.
  default: arrays in the same structure; what the checkpoint lacks comes from here. None refuses such a checkpoint.

  Returns:
    (variables, names of those that came from `default`, such as 'params/segment_0/layer_0/mixer/w_index_q').

  Raises:
    CheckpointError: there is no whole checkpoint, or it has another model; all names that do not fit are counted.
  """
  saved = Parameters(folder)
  wanted, treedef = checkpoint.named_leaves(abstract_variables)
  here = {name: checkpoint.describe(leaf) for name, leaf in wanted.items()}
  missing = [name for name in here if name not in saved.leaves]
  surplus = [name for name in saved.leaves if name not in here and not name.startswith(OPTIONAL)]
  misshapen = [name for name in here if name in saved.leaves and saved.leaves[name] != here[name]]
  if misshapen:
    shapes = [f'{name} is {saved.leaves[name]["shape"]} there, {here[name]["shape"]} here' for name in misshapen]
    raise CheckpointError(f'checkpoint {saved.path} has another model: {shown(shapes)}')
  if surplus:
    raise CheckpointError(f'checkpoint {saved.path} has another model: unknown here are {shown(surplus)}')
  if missing and default is None:
    raise CheckpointError(f'checkpoint {saved.path} has another model: it lacks {shown(missing)}')
  given = {} if default is None else checkpoint.named_leaves(default)[0]
  arrays = [given[name] if name in missing else saved.restore(name, leaf) for name, leaf in wanted.items()]
  return jax.tree.unflatten(treedef, arrays), missing


def shown(names: list[str]) -> str:
  """The first few of a list, and how many more."""
  rest = len(names) - SHOWN
  return ', '.join(names[:SHOWN]) + (f' and {rest:,} more' if rest > 0 else '')


class Parameters:
  """Arrays of the newest whole checkpoint of a run folder, by name; nothing is read before it is asked for.

  path: of the checkpoint. step: at which it was saved, 0 for an import.
  leaves: {name: {'shape': [...], 'dtype': 'float32'}}, parameters and expert biases.
  """

  def __init__(self, folder: str | os.PathLike):
    folder = epath.Path(folder)
    inside = folder / 'checkpoints'
    reader = checkpoint.Checkpointer(inside if inside.exists() else folder, keep=None)
    try:
      found = reader.latest_path()
      if found is None:
        raise CheckpointError(f'{folder}: no whole checkpoint here; give the folder of a run')
    finally:
      reader.close()
    self.path = found
    record = json.loads((found / 'metadata.json').read_text())
    self.step = record['step']
    self.leaves = {name: leaf for name, leaf in record['leaves'].items() if name.split('/')[0] in COLLECTIONS}
    self._packed = (found / 'state' / 'manifest.ocdbt').exists()  # Orbax packs the arrays of training into a database

  def open(self, name: str):
    """The tensorstore.TensorStore of one array: `open(name)[index].read().result()` is a numpy array."""
    import tensorstore

    files = _kvstore(self.path / 'state' / ('' if self._packed else name))
    packed = {'driver': 'ocdbt', 'base': files, 'path': f'{name}/'}
    return tensorstore.open({'driver': 'zarr', 'kvstore': packed if self._packed else files}, read=True).result()

  def restore(self, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """The array in the placement of `leaf`; each process reads what its devices hold."""
    array = self.open(name)
    placed = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    read = lambda index: array[index].read().result()
    return jax.make_array_from_callback(leaf.shape, placed, read)


class ParametersWriter:
  """Writes a checkpoint of parameters piece by piece: `with ParametersWriter(...) as writer: writer.write(...)`.

  Memory is that of a few pieces. What a `with` leaves by an exception is removed; otherwise the end seals the checkpoint.

  folder: of the run, new or without checkpoints.
  abstract_variables: as for `restore_params`; a chunk on disk never spans two devices of these shardings.
  pieces: {name: shape of one `write`}, by which chunks are cut; a whole array if left out.

  Raises:
    CheckpointError: the folder holds a checkpoint already.
  """

  def __init__(self, folder: pathlib.Path, abstract_variables: Any, pieces: Mapping[str, tuple[int, ...]]):
    self.path = epath.Path(folder).expanduser().absolute() / 'checkpoints' / str(checkpoint.Mark(0))
    if self.path.parent.exists() and list(self.path.parent.iterdir()):
      raise CheckpointError(f'{folder} holds checkpoints already; give another folder')
    self._leaves = checkpoint.named_leaves(abstract_variables)[0]
    self._pieces = pieces
    self._arrays: dict[str, Any] = {}
    self._pending = collections.deque()

  def __enter__(self):
    import orbax.checkpoint as ocp

    # Orbax writes its own tables, for arrays of these names; their files are then put in the place of its scalars.
    orbax = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False, use_ocdbt=False))
    logging.get_absl_logger().addFilter(checkpoint.without_orbax_noise)
    self.path.mkdir(parents=True)
    orbax.save(self.path / 'state', args=ocp.args.PyTreeSave({name: np.zeros(()) for name in self._leaves}))
    orbax.close()
    return self

  def write(self, name: str, index: tuple, values: np.ndarray) -> None:
    """Sets a part of an array; what is never set is 0. Returns while the last pieces are still on their way."""
    if name not in self._arrays:
      self._arrays[name] = self._create(name)
    if len(self._pending) == IN_FLIGHT:
      self._pending.popleft().result()
    self._pending.append(self._arrays[name][index].write(values))

  def __exit__(self, kind, error, traceback):
    if kind is None:
      for write in self._pending:
        write.result()
      for name in self._leaves.keys() - self._arrays.keys():
        self._create(name)
      leaves = {name: checkpoint.describe(leaf) for name, leaf in self._leaves.items()}
      checkpoint.seal(self.path, {'metadata.json': checkpoint.record(0, leaves, {})})
    else:
      shutil.rmtree(self.path.parent)

  def _create(self, name):
    import tensorstore

    leaf = self._leaves[name]
    local = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    chunks = [min(sizes) for sizes in zip(local, self._pieces.get(name, leaf.shape), strict=True)]
    metadata = {
        'zarr_format': 2, 'shape': list(leaf.shape), 'chunks': chunks, 'dtype': np.dtype(leaf.dtype).str,
        'compressor': None, 'filters': None, 'fill_value': None, 'order': 'C',
    }
    spec = {'driver': 'zarr', 'kvstore': _kvstore(self.path / 'state' / name), 'metadata': metadata}
    return tensorstore.open(spec, create=True, delete_existing=True).result()


def _kvstore(path: epath.Path):
  """Where TensorStore finds a folder: on a disk, or by an address such as gs://."""
  path = os.fspath(path)
  return f'{path}/' if '://' in path else {'driver': 'file', 'path': f'{path}/'}
