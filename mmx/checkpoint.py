"""Checkpoints: the whole state of a run at a step, written behind the loop's back and never half believed.

  directory/
    00000200/
      state/            the arrays, by Orbax, under names such as 'params/embed/embedding'
      metadata.json     shape and dtype of every array, and what the run says of itself
      data.0-of-1.json  where the data iterator stands, a file per process
      seal.0-of-1.json  size and CRC-32 of every file above, written last; each process seals its share

A checkpoint is one only when all its seals are there, and it is read only if every byte still answers to them: Orbax
notices a damaged array when it reads it or, with a flipped bit, never. Hashing runs at about 1 GB/s and thread; the
files are shared between processes and threads.

Between those that all processes write together, each may keep one of its own on its host's disk: the same folder, in
which state/ holds what this process's devices hold, with placement.json and one seal. It is a checkpoint only where
every process has its part. (Orbax's emergency.CheckpointManager is not used: it asks for two slices that hold the same
state, keeps nothing local on the first, and has no checksums.)
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax.sharding import SingleDeviceSharding

from mmx import distributed

logger = logging.getLogger(__name__)

STEP_FOLDER = re.compile(r'(\d{8,})(?:\.(\d+))?')
SEAL = re.compile(r'seal\.(\d+)-of-(\d+)\.json')
HASHED_CHUNK_BYTES = 1 << 22
HASHING_THREADS = 8
WRITE_TIMEOUT_S = 3600
KEY_IMPLEMENTATIONS = {'key<fry>': 'threefry2x32', 'key<rbg>': 'rbg', 'key<urbg>': 'unsafe_rbg'}  # by dtype


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be written, or is not this run's; the message is one line that names folder and reason."""


class NonFiniteError(RuntimeError):
  """Training has left the finite numbers; the message is one line that names the step and the metrics."""


def check_finite(step: int, metrics: Mapping[str, Any]) -> None:
  """Refuses NaN and infinity in any metric, a number or an array. Called before each save, it keeps the last one good.

  Include the gradient norm: an update by NaN gradients shows in the loss one step later only.
  """
  broken = [f'{name} = {np.asarray(value).sum()}' for name, value in metrics.items() if not np.isfinite(value).all()]
  if broken:
    raise NonFiniteError(f'step {step}: {", ".join(broken)}')


class Mark(NamedTuple):
  """Names a checkpoint; they sort by age. A step saved again gets the next attempt: the old one stays until then."""

  step: int
  attempt: int = 0

  def __str__(self) -> str:
    return f'{self.step:08d}' + (f'.{self.attempt}' if self.attempt else '')


class Checkpointer:
  """Saves asynchronously, keeps the `keep` newest, restores the newest that is whole.

  keep: checkpoints that stay; None only reads: it creates, cleans and deletes nothing, so it may look into the folder
    of a run that is still going.
  own: None for one folder that all processes share (or gs://). Otherwise each has a folder of its own, for its part of
    states that are placed as this one (jax.ShapeDtypeStruct leaves with shardings).

  With several processes all of them call the same methods in the same order. Close it in a `finally`: a save on its way
  when the interpreter ends is lost.

  Raises:
    CheckpointError: the directory cannot be written.
  """

  def __init__(self, directory: str | os.PathLike, keep: int | None, own: Any = None):
    self.directory = epath.Path(directory)
    self._placement = None if own is None else placement(own)
    self._index, self._count = (jax.process_index(), jax.process_count()) if own is None else (0, 1)
    if self._is_local():
      self.directory = self.directory.expanduser().absolute()
    self.keep = keep
    self._rejected: set[Mark] = set()
    self._verified: set[Mark] = set()
    self._pending: tuple[Mark, Future] | None = None
    self._background = ThreadPoolExecutor(1, 'checkpoint')
    self._orbax = _orbax() if own is None else _orbax_of_one()
    absl_logging.get_absl_logger().addFilter(without_orbax_noise)
    self._attempts: dict[int, int] = {}  # step → its last attempt
    self._first_attempt = 0  # of a step saved by this job
    if keep is not None:
      self._prepare()

  def save(self, step: int, state: Any, data_iterator: Any, metadata: dict[str, Any]) -> None:
    """Starts a checkpoint; returns when the arrays are copied to the host, so that the step may donate them.

    state: any pytree of arrays: sharded jax arrays, typed random keys, numpy arrays and numbers
      (as jax would hold them: int32 and float32, unless it is set to 64 bits).
    data_iterator: its get_state() must be a JSON-able dict whose names mean the same on every process, and stand right
      behind the batch of `step`; None if there is none.
    metadata: JSON-able, small.

    Raises:
      CheckpointError: this save cannot begin, or the one before it failed. Older checkpoints stay as they are.
    """
    self.wait()
    arrays, leaves = _to_arrays(state)
    files = {}
    if self._index == 0:
      files['metadata.json'] = record(step, leaves, metadata)
    if self._placement is not None:
      files['placement.json'] = self._placement
    if data_iterator is not None:
      files[_data_name()] = json.dumps(data_iterator.get_state())
    self._attempts[step] = max(self._first_attempt, self._attempts.get(step, -1) + 1)
    mark = Mark(step, self._attempts[step])
    try:
      self._require_space(sum(map(self._stored_bytes, arrays.values())))
      self._path(mark).mkdir(parents=True, exist_ok=True)
      self._orbax.save(self._path(mark) / 'state', args=ocp.args.PyTreeSave(arrays))
    except Exception as error:
      raise self._failure(mark, error) from error
    self._pending = mark, self._background.submit(self._finish, mark, files)

  def wait(self) -> None:
    """Returns when the save on its way has arrived.

    Raises:
      CheckpointError: it failed. Its remains are gone, older checkpoints stay as they are and the next save may work.
    """
    if self._pending is not None:
      mark, future = self._pending
      self._pending = None
      try:
        future.result()
      except Exception as error:
        raise self._failure(mark, error) from error

  def latest_valid(self) -> int | None:
    """The step that `restore` would return; every damaged checkpoint that it passes over is a warning, once."""
    mark = self._newest_whole()
    return None if mark is None else mark.step

  def latest_metadata(self) -> dict[str, Any] | None:
    """The metadata that `restore` would return, without reading an array."""
    mark = self._newest_whole()
    return None if mark is None else self._record(mark)['metadata']

  def latest_path(self) -> epath.Path | None:
    """The folder that `restore` would read, every byte of it checked."""
    mark = self._newest_whole()
    return None if mark is None else self._path(mark)

  def restore(self, abstract_state: Any, data_iterator: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """(step, state, metadata) of the newest checkpoint that is whole, bit for bit; None if there is none.

    abstract_state: jax.ShapeDtypeStruct leaves in the structure of the saved state. Their shardings need not be those
      of the save, but all should be of one mesh: a restored array is committed to its devices. A leaf without one goes
      to the first local device.
    data_iterator: gets the saved states of all processes in one dict (set_state); None leaves it unread.

    Raises:
      CheckpointError: the checkpoint has another model.
    """
    mark = self._newest_whole()
    if mark is None:
      return None
    record = self._record(mark)
    named, treedef = named_leaves(abstract_state)
    self._require_same_leaves(mark, record['leaves'], {name: describe(leaf) for name, leaf in named.items()})
    data_state = None if data_iterator is None else self._data_state(mark)
    wanted = {name: _abstract_array(leaf) for name, leaf in named.items()}
    stored = {name: leaf for name, leaf in wanted.items() if leaf.size}
    arguments = {name: ocp.ArrayRestoreArgs(sharding=leaf.sharding) for name, leaf in stored.items()}
    try:
      restore = ocp.args.PyTreeRestore(item=stored, restore_args=arguments)
      arrays = self._orbax.restore(self._path(mark) / 'state', args=restore)
    except Exception as error:  # the bytes are those that were written: memory is short, or this is another Orbax
      raise CheckpointError(f'checkpoint {self._path(mark)} cannot be read: {_reason(error)}') from error
    for name in wanted.keys() - stored.keys():
      arrays[name] = jnp.zeros(wanted[name].shape, wanted[name].dtype, device=wanted[name].sharding)
    for name in (name for name, leaf in named.items() if _is_key(leaf)):
      arrays[name] = jax.random.wrap_key_data(arrays[name], impl=KEY_IMPLEMENTATIONS[str(named[name].dtype)])
    if data_iterator is not None:
      data_iterator.set_state(data_state)
    return mark.step, jax.tree.unflatten(treedef, [arrays[name] for name in named]), record['metadata']

  def close(self) -> None:
    """Waits like `wait` and releases the threads."""
    try:
      self.wait()
    finally:
      self._background.shutdown()
      with contextlib.suppress(Exception):  # what `save` or `wait` has told in one line, again and in a page
        self._orbax.close()

  # Writing.

  def _prepare(self) -> None:
    """Proves before anything is compiled that the directory can be written, and clears what failed saves left."""
    probe = self.directory / f'.probe.{jax.process_index()}'
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      probe.write_text('')
      probe.unlink()
    except Exception as error:  # OSError on a disk, the client library's own on gs://
      raise CheckpointError(f'checkpoints cannot be written to {self.directory}: {_reason(error)}') from error
    if self._index == 0:
      for mark in sorted(self._marks() - self._sealed()):
        logger.warning('checkpoint %s was never finished; removed', self._path(mark))
        self._remove(mark)
    distributed.barrier('checkpoint directory is clean')
    self._attempts.update(sorted(self._marks()))
    if self._placement is not None:  # parts of different jobs must never look like one checkpoint
      self._first_attempt = int(distributed.gather([max(self._attempts.values(), default=-1)]).max()) + 1
    distributed.barrier('all have seen the same checkpoints')  # before the first of them adds one

  def _stored_bytes(self, array: Any) -> int:
    """Of an array, on this directory's disk."""
    if self._placement is None:
      return array.nbytes
    return sum(shard.data.nbytes for shard in _own_shards(array))

  def _require_space(self, num_bytes: int) -> None:
    """A full disk in the middle of a save is survived too, but not told as clearly."""
    if self._is_local():
      free = shutil.disk_usage(self.directory).free
      if free < num_bytes:
        needed = f'{num_bytes / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free'
        raise OSError(errno.ENOSPC, f'{os.strerror(errno.ENOSPC)} ({needed})')

  def _finish(self, mark: Mark, files: dict[str, str]) -> None:
    """In the background: arrays, the small files, this process's seal; then the first process clears old ones."""
    path = self._path(mark)
    self._orbax.wait_until_finished()  # of all processes
    seal(path, files, self._index, self._count)
    if self._index == 0:
      self._clear(mark)

  def _clear(self, saved: Mark) -> None:
    """Removes what is older than the newest `keep`, repeated or damaged; what is newer than `saved` and whole stays."""
    whole = dict(sorted(mark for mark in self._sealed() - self._rejected if mark <= saved))  # last attempt of each step
    survivors = {saved, *[Mark(*item) for item in whole.items()][-self.keep :]}
    for mark in self._marks() - survivors:
      if mark < saved or mark in self._rejected:
        try:
          self._remove(mark)
        except Exception as error:  # the new checkpoint stands all the same
          logger.warning('checkpoint %s could not be removed: %s', self._path(mark), _reason(error))

  def _remove(self, mark: Mark) -> None:
    """Unsealed first, so that what a crash leaves is never taken for a checkpoint."""
    for seal in self._seals(mark):
      seal.unlink(missing_ok=True)
    self._path(mark).rmtree(missing_ok=True)

  def _failure(self, mark: Mark, error: Exception) -> CheckpointError:
    if self._index == 0:
      with contextlib.suppress(Exception):  # as far as it goes; the next start clears the rest
        self._remove(mark)
    older = sorted(self._sealed() - self._rejected)
    standing = f'the newest one is still {self._path(older[-1])}' if older else 'there is none before it'
    return CheckpointError(f'checkpoint {self._path(mark)} was not written: {_reason(error)}; {standing}')

  # Reading.

  def _newest_whole(self) -> Mark | None:
    """The same on every process, or an error: each looks at its share of the files and all must agree."""
    self.wait()
    distributed.barrier('all have sealed')
    remaining = sorted(self._sealed() - self._rejected)
    while True:
      mark = remaining.pop() if remaining else Mark(-1)
      fault = None if mark.step < 0 or mark in self._verified else self._fault(mark)
      seen = distributed.gather([*mark, fault is not None])
      if (seen[:, :2] != seen[0, :2]).any():
        if self._placement is None:
          raise CheckpointError(f'processes see different checkpoints in {self.directory}; it must be a shared folder')
        if mark > (common := Mark(*min(seen[:, :2].tolist()))):  # no newer one can be whole
          logger.warning('checkpoint %s is passed over: another process lacks its part', self._path(mark))
          self._rejected.add(mark)
        else:
          remaining.append(common)
        continue
      if mark.step < 0:
        return None
      if not seen[:, 2].any():
        self._verified.add(mark)
        return mark
      self._rejected.add(mark)
      if fault is not None:
        logger.warning('checkpoint %s is damaged and passed over: %s', self._path(mark), fault)

  def _fault(self, mark: Mark) -> str | None:
    """What is wrong with this process's share of the files of a sealed checkpoint; None if nothing is."""
    path = self._path(mark)
    sums = {}
    for seal in self._seals(mark):
      try:
        sums.update({name: (int(size), int(crc)) for name, (size, crc) in json.loads(seal.read_text()).items()})
      except (AttributeError, TypeError, ValueError):
        return f'{seal.name} is not readable'
    if not sums:
      return 'it lists no files'
    names = sorted(sums)[self._index :: self._count]
    for name in names:
      if not (path / name).exists():
        return f'{name} is missing'
      size = (path / name).stat().length
      if size != sums[name][0]:
        return f'{name} has {size:,} bytes of {sums[name][0]:,}'
      if name == 'placement.json' and (path / name).read_text() != self._placement:
        return 'it is of another mesh or number of processes'
    for name, found in zip(names, _checksums([path / name for name in names]), strict=True):
      if found != sums[name]:
        return f'{name} is not what was written (CRC-32)'
    return None

  def _record(self, mark: Mark) -> dict[str, Any]:
    return json.loads((self._path(mark) / 'metadata.json').read_text())

  def _data_state(self, mark: Mark) -> dict[str, Any]:
    """The data iterator's states of all processes in one: each names what it stands for, such as a row of the batch."""
    files = sorted(self._path(mark).glob('data.*-of-*.json'))
    if not files:
      raise CheckpointError(f'checkpoint {self._path(mark)} has no data position')
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
      states = threads.map(lambda file: json.loads(file.read_text()), files)
      return {name: place for state in states for name, place in state.items()}

  def _require_same_leaves(self, mark: Mark, found: dict[str, dict], wanted: dict[str, dict]) -> None:
    for name in [*wanted, *found]:
      if found.get(name) != wanted.get(name):
        there, here = (_phrase(leaves.get(name)) for leaves in (found, wanted))
        raise CheckpointError(f'checkpoint {self._path(mark)} has another model: {name} is {there} there, {here} here')

  # The folder.

  def _is_local(self) -> bool:
    return '://' not in os.fspath(self.directory)

  def _path(self, mark: Mark) -> epath.Path:
    return self.directory / str(mark)

  def _marks(self) -> set[Mark]:
    if not self.directory.exists():
      return set()
    matches = [STEP_FOLDER.fullmatch(path.name) for path in self.directory.iterdir() if path.is_dir()]
    return {Mark(int(match[1]), int(match[2] or 0)) for match in matches if match}

  def _sealed(self) -> set[Mark]:
    return {mark for mark in self._marks() if self._seals(mark)}

  def _seals(self, mark: Mark) -> list[epath.Path]:
    """All seals of a checkpoint, or none if one is lacking."""
    try:
      seals = [path for path in self._path(mark).iterdir() if SEAL.fullmatch(path.name)]
    except FileNotFoundError:  # just removed by the run that is being watched
      return []
    return seals if seals and len(seals) == int(SEAL.fullmatch(seals[0].name)[2]) else []


def record(step: int, leaves: Mapping[str, dict], metadata: Mapping[str, Any]) -> str:
  """Text of metadata.json; `leaves` as `describe` has them."""
  return json.dumps({'step': step, 'leaves': leaves, 'metadata': metadata}, indent=1)


def seal(path: epath.Path, files: Mapping[str, str], index: int = 0, count: int = 1) -> None:
  """Makes a checkpoint of a folder with a finished state/: small files, then the seal of share `index` of `count`."""
  for name, text in files.items():
    (path / name).write_text(text)
  sealed = [*_files_below(path, 'state')[index::count], *files]
  sums = dict(zip(sealed, _checksums([path / name for name in sealed]), strict=True))
  final = path / f'seal.{index}-of-{count}.json'
  unfinished = path / f'{final.name}.tmp'
  unfinished.write_text(json.dumps(sums, indent=1))
  unfinished.replace(final)


def placement(state: Any) -> str:
  """JSON text: which part of every array this process's devices hold, by name. `state`: leaves with a sharding."""
  parts = {}
  for name, leaf in named_leaves(state)[0].items():
    places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    parts[name] = sorted({str([part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True)])
                          for index in places.values()})
  return json.dumps({'process': [jax.process_index(), jax.process_count()], 'parts': parts})


def named_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
  """({'params/embedding/table': leaf, ...}, treedef): the names under which a checkpoint keeps the arrays of a tree."""
  leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}, treedef


def _orbax() -> ocp.AsyncCheckpointer:
  """All processes write one state/ together. zstd takes 11% off float32 weights and halves the speed."""
  return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False), WRITE_TIMEOUT_S)


def _orbax_of_one() -> ocp.AsyncCheckpointer:
  """Every process writes a state/ of what `_own_shards` are, and reads it back into the same placement."""
  alone = ocp.options.MultiprocessingOptions(primary_host=None, barrier_sync_key_prefix='own')
  arrays = ocp.type_handlers.ArrayHandler(primary_host=None, replica_id=None, use_replica_parallel=False)
  handler = ocp.PyTreeCheckpointHandler(
      use_compression=False, multiprocessing_options=alone,
      type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
  )  # fmt: skip
  # Made in the background, one process's folder stands for all of theirs: others write before they have one.
  at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
  return ocp.AsyncCheckpointer(handler, WRITE_TIMEOUT_S, async_options=at_once, multiprocessing_options=alone)


def _own_shards(array: jax.Array) -> list[Any]:
  """The shards that Orbax keeps for one process: those of the replica that its first device belongs to.

  Raises:
    CheckpointError: they are not all that the process holds, and what is missing would be read back as zeros.
  """
  shards = array.addressable_shards
  kept = [shard for shard in shards if shard.replica_id == shards[0].replica_id]
  if len(kept) < len({str(shard.index) for shard in shards}):
    raise CheckpointError('this mesh gives a process parts of different replicas: train.local_checkpoint_every = 0')
  return kept


def _is_key(leaf: Any) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_arrays(state: Any) -> tuple[dict[str, Any], dict[str, dict]]:
  """Arrays that Orbax can write, and what all leaves are: keys become their uint32 words, empty arrays are left out."""
  arrays, leaves = {}, {}
  for name, leaf in named_leaves(state)[0].items():
    leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf, jnp.result_type(leaf))
    leaves[name] = describe(leaf)
    if leaf.size:
      arrays[name] = jax.random.key_data(leaf) if _is_key(leaf) else leaf
  return arrays, leaves


def _abstract_array(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
  array = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def describe(leaf: Any) -> dict[str, Any]:
  """Shape and dtype, JSON-able."""
  return {'shape': list(leaf.shape), 'dtype': str(leaf.dtype)}


def _phrase(description: dict[str, Any] | None) -> str:
  return f'{description["dtype"]} {description["shape"]}' if description else 'absent'


def _data_name() -> str:
  return f'data.{jax.process_index()}-of-{jax.process_count()}.json'


def _files_below(root: epath.Path, folder: str) -> list[str]:
  """Sorted paths relative to `root`."""
  names = []
  for path in sorted((root / folder).iterdir()):
    name = f'{folder}/{path.name}'
    names += _files_below(root, name) if path.is_dir() else [name]
  return names


def _checksums(paths: list[epath.Path]) -> list[tuple[int, int]]:
  """(size in bytes, CRC-32) of each file."""
  with ThreadPoolExecutor(HASHING_THREADS) as threads:
    return list(threads.map(_checksum, paths))


def _checksum(path: epath.Path) -> tuple[int, int]:
  size, crc = 0, 0
  with path.open('rb') as file:
    while chunk := file.read(HASHED_CHUNK_BYTES):
      size, crc = size + len(chunk), zlib.crc32(chunk, crc)
  return size, crc


def _reason(error: Exception) -> str:
  """One line: what the operating system says, where TensorStore hides it in a page of its own."""
  if code := re.search(r"os_error_code='(\d+)'", str(error)):
    return os.strerror(int(code[1]))
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return f'{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else "no message"}'


def without_orbax_noise(record: Any) -> bool:
  """Filter for absl's logger: Orbax logs a failed write three times with tracebacks, besides raising it, and warns that
  it merges no databases where there are none and does not measure what one process writes alone."""
  noise = record.exc_info or 'Skipping merge' in str(record.msg) or 'object size logging' in str(record.msg)
  return 'orbax' not in record.pathname or not noise
