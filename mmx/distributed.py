"""Several processes as one program: set-up, whose turn it is to write, batches over all devices, and orderly stops.

The same script runs on one process and on many; with one, nothing here talks to anybody.
"""

import glob
import importlib.util
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Mapping
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx.config import ConfigError

METADATA_TIMEOUT_S = 5  # a TPU VM's server answers within milliseconds; elsewhere its name fails at once


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
  """Joins this process to the others, before any use of a device; does nothing where there is only one process.

  What is not passed comes from MMX_COORDINATOR (host:port of process 0), MMX_NUM_PROCESSES and MMX_PROCESS_ID. If none
  of the three is known, a SLURM step of several tasks or a TPU slice of several hosts is found by jax itself.

  Raises:
    ConfigError: one or two of the three are known, or a number is none or out of range.
  """
  given = {
      'MMX_COORDINATOR': coordinator or os.environ.get('MMX_COORDINATOR'),
      'MMX_NUM_PROCESSES': os.environ.get('MMX_NUM_PROCESSES') if num_processes is None else num_processes,
      'MMX_PROCESS_ID': os.environ.get('MMX_PROCESS_ID') if process_id is None else process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    if slurm_tasks() > 1 or tpu_hosts() > 1:
      jax.distributed.initialize()
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
  if count > 1:
    jax.distributed.initialize(given['MMX_COORDINATOR'], count, index)


def slurm_tasks() -> int:
  """Tasks of the SLURM step that this process belongs to; a batch script outside `srun` is in none."""
  return int(os.environ.get('SLURM_STEP_NUM_TASKS', 1)) if 'SLURM_PROCID' in os.environ else 1


def tpu_hosts() -> int:
  """Hosts of the TPU slice that this machine belongs to, 1 off TPU.

  GKE puts their names into the environment; a TPU VM asks its metadata server, but only if it has chips and libtpu.
  """
  if hosts := os.environ.get('TPU_WORKER_HOSTNAMES'):
    return len(hosts.split(','))
  if not importlib.util.find_spec('libtpu') or not (glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')):
    return 1
  return metadata_hosts()


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


def put_batch(local_batch: Mapping[str, np.ndarray], mesh: Mesh, spec: PartitionSpec) -> dict[str, jax.Array]:
  """Each process's rows [B / processes, ...] as global arrays [B, ...] laid out by `spec`, without any communication.

  The rows of process p must be those that the mesh gives to p's devices: successive blocks in order of process, if the
  axes of `spec` are the outer ones of the mesh. Dimensions that `spec` leaves out are whole on every device.

  Raises:
    ValueError: the rows do not divide by this process's share of the axes in `spec`.
  """
  sharding = NamedSharding(mesh, spec)
  return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in local_batch.items()}


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
