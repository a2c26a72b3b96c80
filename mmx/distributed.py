"""Several processes as one program: set-up, whose folder it is, batches over all devices, and orderly stops.

The same script runs on one process and on many; with one, nothing here talks to anybody.
"""

import contextlib
import functools
import glob
import importlib.util
import math
import os
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx import sharding
from mmx.claim import held
from mmx.config import ConfigError

METADATA_TIMEOUT_S = 5  # a TPU VM's server answers within milliseconds; elsewhere its name fails at once
CONNECT_TIMEOUT_S = 300  # hosts of a pod start minutes apart
HEARTBEAT_TIMEOUT_S = 60  # of jax: so long after a process has died, it ends the others; its own default is 100
SHUTDOWN_TIMEOUT_S = 60  # at exit, for the slowest process; jax's own default is 300
CLAIM_BYTES = 1024  # of a refusal, as the other processes are told it


# ----------------------------------------------------------------------------------------------------------------------
# joining the others


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
  """Joins this process to the others, before any use of a device; does nothing where there is only one process.

  What is not passed comes from MMX_COORDINATOR (host:port of process 0), MMX_NUM_PROCESSES and MMX_PROCESS_ID. If none
  of the three is known, a SLURM step of several tasks or TPU slices of several hosts are found by jax itself.

  Raises:
    ConfigError: one or two of the three are known, or one is no number, out of range, or no host:port.

  Ends the process with a line and exit code 1 if the others have not come after CONNECT_TIMEOUT_S.
  """
  given = {
      'MMX_COORDINATOR': coordinator or os.environ.get('MMX_COORDINATOR'),
      'MMX_NUM_PROCESSES': os.environ.get('MMX_NUM_PROCESSES') if num_processes is None else num_processes,
      'MMX_PROCESS_ID': os.environ.get('MMX_PROCESS_ID') if process_id is None else process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    if slurm_tasks() > 1 or tpu_hosts() * tpu_slices() > 1:
      _join()
    return
  if missing:
    known = ', '.join(f'{name}={value}' for name, value in given.items() if value is not None)
    raise ConfigError(f'{" and ".join(missing)} must be set too, with {known}')
  try:
    count, index = int(given['MMX_NUM_PROCESSES']), int(given['MMX_PROCESS_ID'])
  except ValueError as error:
    raise ConfigError(f'MMX_NUM_PROCESSES and MMX_PROCESS_ID must be whole numbers: {error}') from None
  if not 0 <= index < count:
    raise ConfigError(f'MMX_PROCESS_ID must be at least 0 and below MMX_NUM_PROCESSES={count}, found {index}')
  host, _, port = given['MMX_COORDINATOR'].rpartition(':')
  if not host or not port.isdecimal():
    raise ConfigError(f'MMX_COORDINATOR must be host:port of process 0, found {given["MMX_COORDINATOR"]!r}')
  if count > 1:
    _join(given['MMX_COORDINATOR'], count, index)


def _join(*cluster) -> None:
  """jax.distributed.initialize, which aborts with a page of C++ frames if somebody does not come; we end before it."""
  known = dict(zip(('process 0 at', 'processes', 'this is process'), cluster, strict=False))
  told = ', '.join(f'{name} {value}' for name, value in known.items()) or 'as SLURM or the TPU slice names them'

  def give_up():
    print(f'error: the processes of this job ({told}) did not all meet within {CONNECT_TIMEOUT_S} s; '
          'is each one started, and can it reach process 0?', file=sys.stderr, flush=True)
    os._exit(1)  # the main thread waits inside jax

  timer = threading.Timer(CONNECT_TIMEOUT_S, give_up)
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
        *cluster, initialization_timeout=CONNECT_TIMEOUT_S + 60,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S, shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
    )  # fmt: skip
  finally:
    timer.cancel()


def slurm_tasks() -> int:
  """Tasks of the SLURM step that this process belongs to; a batch script outside `srun` is in none."""
  return int(os.environ.get('SLURM_STEP_NUM_TASKS', 1)) if 'SLURM_PROCID' in os.environ else 1


def tpu_hosts() -> int:
  """Hosts of the TPU slice that this machine belongs to, 1 off TPU.

  GKE puts their names into the environment; a TPU VM asks its metadata server, but only if it has chips and libtpu.
  """
  if hosts := os.environ.get('TPU_PROCESS_ADDRESSES') or os.environ.get('TPU_WORKER_HOSTNAMES'):
    return len(hosts.split(','))
  if not importlib.util.find_spec('libtpu') or not (glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')):
    return 1
  return metadata_hosts()


def tpu_slices() -> int:
  """TPU slices of this job, as GKE and queued resources put it into the environment of each host; 1 if there is one."""
  return int(os.environ.get('MEGASCALE_NUM_SLICES') or 1)


def metadata_hosts() -> int:
  """Entries of the slice's host list on the metadata server, 1 if there is no such server or list."""
  server = os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')
  url = f'http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints'
  request = urllib.request.Request(url, headers={'Metadata-Flavor': 'Google'})
  try:
    with urllib.request.urlopen(request, timeout=METADATA_TIMEOUT_S) as reply:
      return len(reply.read().decode().split(','))
  except (urllib.error.URLError, TimeoutError):
    return 1


# ----------------------------------------------------------------------------------------------------------------------
# one word among all


def is_primary() -> bool:
  """True on the one process that writes logs, summaries and folders."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until every process has come to the barrier of this name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def gather(values: list[int]) -> np.ndarray:
  """The numbers of every process, int32 [processes, n]. All processes call it, at the same place with the same n."""
  local = np.asarray(values, np.int32)
  return multihost_utils.process_allgather(local) if jax.process_count() > 1 else local[None]


# ----------------------------------------------------------------------------------------------------------------------
# batches over all devices


def data_shard(mesh: Mesh) -> tuple[int, int]:
  """(index, count): this process makes block `index` of the `count` blocks that the rows of a batch are cut into.

  Processes whose devices hold the same rows (tensor or context across hosts) have the same index and read the same
  data. Where the mesh gives a process rows that are not neighbours, as the torus of a TPU slice may, the blocks are the
  same, and it is their places in the global batch that differ: its content is one on any number of processes.

  Raises:
    ConfigError: a process has no device in the mesh, or shares only some of its rows with another.
  """
  return _share(mesh, sharding.BATCH_AXES)[2:]


def put_batch(local_batch: Mapping[str, np.ndarray], mesh: Mesh, spec: PartitionSpec) -> dict[str, jax.Array]:
  """Each process's rows [B / count, ...] as global arrays [B, ...] laid out by `spec`, without any communication.

  The rows are those of `data_shard`, in every other dimension whole, even where `spec` splits it over processes.

  Raises:
    ValueError: the rows do not divide by the devices that they are split over.
    ConfigError: as `data_shard`.
  """
  blocks, mine, _, count = _share(mesh, spec[0] if len(spec) else None)
  layout = NamedSharding(mesh, spec)

  def put(rows):
    total = len(rows) * count
    if total % blocks:
      raise ValueError(f'{total} rows do not divide by the {blocks} blocks of {spec} on this mesh')
    size = total // blocks
    start = {block * size: position * size for position, block in enumerate(mine)}  # in the global array: among mine

    def shard(index):
      first = start[index[0].start or 0]
      return rows[first : first + size, *index[1:]]

    return jax.make_array_from_callback((total, *rows.shape[1:]), layout, shard)

  return {name: put(rows) for name, rows in local_batch.items()}


def put_whole(batch: Mapping[str, np.ndarray], mesh: Mesh, spec: PartitionSpec) -> dict[str, jax.Array]:
  """Rows [B, ...] that every process has, as global arrays in this very order, laid out by `spec`."""
  layout = NamedSharding(mesh, spec)
  return {name: jax.make_array_from_callback(rows.shape, layout, rows.__getitem__) for name, rows in batch.items()}


class _Share(NamedTuple):
  blocks: int  # that the mesh cuts rows into
  mine: tuple[int, ...]  # those on this process's devices, in order
  index: int  # of this set among the different ones
  count: int


@functools.cache
def _share(mesh: Mesh, axes: str | tuple[str, ...] | None) -> _Share:
  """What `data_shard` says of rows that are split over `axes`."""
  axes = (axes,) if isinstance(axes, str) else axes or ()
  rest = [axis for axis in mesh.axis_names if axis not in axes]
  order = [mesh.axis_names.index(axis) for axis in (*axes, *rest)]
  devices = mesh.devices.transpose(order).reshape(math.prod(mesh.shape[axis] for axis in axes), -1)  # [block, copy]
  return _share_of([{device.process_index for device in row} for row in devices], jax.process_index())


def _share_of(holders: list[set[int]], process: int) -> _Share:
  """holders: of each block, the processes with a device that holds it."""
  held = {}
  for block, processes in enumerate(holders):
    for each in processes:
      held.setdefault(each, []).append(block)
  if process not in held:
    raise ConfigError(f'mesh: process {process} has none of its devices, which are of processes {sorted(held)}; '
                      'start fewer processes, or leave mesh.num_devices at 0')
  shares = sorted({tuple(blocks) for blocks in held.values()})
  if sum(map(len, shares)) > len(holders) or len({len(share) for share in shares}) > 1:
    raise ConfigError(f'mesh: its {len(holders)} blocks of rows do not come apart by process: {shown_shares(held)}; '
                      'the devices of a process must make up whole blocks, or a block whole processes')
  mine = tuple(held[process])
  return _Share(len(holders), mine, shares.index(mine), len(shares))


def shown_shares(held: dict[int, list[int]]) -> str:
  few = [f'process {process} holds {",".join(map(str, blocks))}' for process, blocks in sorted(held.items())[:3]]
  return '; '.join(few) + ('; ...' if len(held) > 3 else '')


# ----------------------------------------------------------------------------------------------------------------------
# whose folder it is


@contextlib.contextmanager
def claim(workdir: str | os.PathLike) -> Iterator[None]:
  """Keeps a folder to this job for the length of the block (mmx/claim.py); all processes enter it together.

  Raises:
    ConfigError: another job has the folder, or it cannot be written; on every process, with the same words.
  """
  refusal = ''
  with contextlib.ExitStack() as stack:
    if is_primary():
      try:
        stack.enter_context(held(workdir))
      except (ConfigError, OSError) as error:
        refusal = str(error)
    words = refusal.encode()[:CLAIM_BYTES].ljust(CLAIM_BYTES)
    if refusal := bytes(gather(list(words))[0].tolist()).decode(errors='ignore').rstrip():
      raise ConfigError(refusal)
    yield


# ----------------------------------------------------------------------------------------------------------------------
# orderly stops


class Preemption:
  """Turns SIGTERM and SIGINT into a flag, so that the loop ends at a step's end and with a checkpoint.

    with Preemption() as preemption:
      for step in ...:
        ...
        if preemption.agreed():
          break

  The second SIGINT raises KeyboardInterrupt at once. On exit the handlers found at entry are back. Only the main thread
  may enter.

  requested: a signal has come to this process.
  signal_name: 'SIGTERM' or 'SIGINT', the first that came; None before.
  """

  def __init__(self):
    self.requested = False
    self.signal_name = None
    self._interrupts = 0
    self._previous = {}

  def __enter__(self) -> 'Preemption':
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number: int, _: FrameType | None) -> None:
    self._interrupts += number == signal.SIGINT
    if self._interrupts > 1:
      raise KeyboardInterrupt
    self.requested = True
    self.signal_name = self.signal_name or signal.Signals(number).name

  def agreed(self) -> bool:
    """Whether any process was asked to stop, the same answer on all, which must ask after the same step.

    Signals reach processes at different steps, and a checkpoint needs all of them at one. With several processes this
    is a collective that waits for the devices: ask every few steps, not at each.
    """
    return bool(gather([self.requested]).any())
