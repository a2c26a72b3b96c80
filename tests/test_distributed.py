"""Several processes as one program, on loopback for real, and orderly stops."""

import contextlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx import claim, distributed, sharding
from mmx.checkpoint import Checkpointer, CheckpointError, Mark
from mmx.config import ConfigError

ROWS = np.arange(8 * 6, dtype=np.int32).reshape(8, 6)
KERNEL = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


# Sizes of mesh axes, and the order of four devices, two of each process → (index, count) of both.
MESHES = {
    'fsdp': ({'fsdp': 4}, (0, 1, 2, 3), [(0, 2), (1, 2)]),
    'rows_that_are_no_neighbours': ({'fsdp': 4}, (0, 2, 1, 3), [(0, 2), (1, 2)]),
    'second_process_first': ({'replica': 2, 'fsdp': 2}, (2, 3, 0, 1), [(1, 2), (0, 2)]),
    'tensor_inside': ({'expert': 2, 'tensor': 2}, (0, 1, 2, 3), [(0, 2), (1, 2)]),
    'tensor_across': ({'fsdp': 2, 'tensor': 2}, (0, 2, 1, 3), [(0, 1), (0, 1)]),
    'more_processes_than_shards': ({'tensor': 4}, (0, 1, 2, 3), [(0, 1), (0, 1)]),
    'context_across': ({'fsdp': 2, 'context': 2}, (0, 2, 1, 3), [(0, 1), (0, 1)]),
    'context_alone': ({'context': 4}, (0, 1, 2, 3), [(0, 1), (0, 1)]),
}
PERMUTED = {'rows_that_are_no_neighbours': [0, 1, 4, 5, 2, 3, 6, 7]}


class Counter:
  """A data iterator as far as a checkpoint is concerned; each process has a part of the position."""

  def __init__(self, position):
    self.position = {f'of process {jax.process_index()}': position}

  def get_state(self):
    return self.position

  def set_state(self, state):
    self.position = state


def state_of(step: int, sharding, replicated) -> dict:
  make = lambda value, layout: jax.make_array_from_callback(value.shape, layout, lambda index: value[index])
  words = make(np.array([step, 5], np.uint32), replicated)
  return {'kernel': make(KERNEL * step, sharding), 'rng': jax.random.wrap_key_data(words), 'step': step}


def abstract(state, replicated):
  """The number `step` comes back as an array on every device."""
  leaf = jax.ShapeDtypeStruct((), np.int32, sharding=replicated)
  describe = lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
  return jax.tree.map(describe, {name: state[name] for name in ('kernel', 'rng')}) | {'step': leaf}


def fed(sizes: dict[str, int], order: tuple[int, ...]) -> dict:
  """What becomes of ROWS, of which each process brings the block that `data_shard` names, on such a mesh."""
  devices = np.array(jax.devices())[list(order)]
  mesh = Mesh(devices.reshape([sizes.get(axis, 1) for axis in sharding.AXES]), sharding.AXES)
  index, count = distributed.data_shard(mesh)
  mine = ROWS[8 // count * index :][: 8 // count, :4]
  whole = jax.jit(lambda rows: rows, out_shardings=NamedSharding(mesh, PartitionSpec()))
  put = distributed.put_batch({'tokens': mine}, mesh, sharding.batch_spec())['tokens']
  same = distributed.put_whole({'tokens': ROWS[:, :4]}, mesh, sharding.batch_spec())['tokens']
  return {'shard': (index, count), 'put': np.asarray(whole(put)).tolist(), 'whole': np.asarray(whole(same)).tolist()}


def worker(directory: str) -> dict:
  """One of two processes with two devices each; what it finds goes to the test as JSON."""
  distributed.initialize()
  me = jax.process_index()
  found = {'process': me, 'processes': jax.process_count(), 'primary': distributed.is_primary()}
  mesh = Mesh(np.array(jax.devices()).reshape(4), ('fsdp',))
  sharding, replicated = NamedSharding(mesh, PartitionSpec('fsdp')), NamedSharding(mesh, PartitionSpec())

  batch = distributed.put_batch({'tokens': ROWS[4 * me : 4 * me + 4]}, mesh, PartitionSpec('fsdp'))
  whole = jax.jit(lambda rows: rows, out_shardings=replicated)(batch['tokens'])
  add = lambda rows: jax.lax.psum(rows.sum(), 'fsdp')
  summed = jax.shard_map(add, mesh=mesh, in_specs=PartitionSpec('fsdp'), out_specs=PartitionSpec())(batch['tokens'])
  found |= {'rows': np.asarray(whole).tolist(), 'sum': int(summed)}

  found['fed'] = {name: fed(sizes, order) for name, (sizes, order, _) in MESHES.items()}

  with contextlib.ExitStack() as stack:
    if me == 1:
      stack.enter_context(claim.held(f'{directory}/claimed'))
    distributed.barrier('process 1, which is no primary one, has claimed it')
    try:
      stack.enter_context(distributed.claim(f'{directory}/claimed'))
    except ConfigError as error:
      found['refused'] = str(error)
    distributed.barrier('both have been refused')
  distributed.barrier('it is free')
  with distributed.claim(f'{directory}/claimed'):
    distributed.barrier('both have it')

  with distributed.Preemption() as preemption:
    found['agreed_before'] = preemption.agreed()
    if me == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    found |= {'requested': preemption.requested, 'agreed': preemption.agreed()}

  checkpointer = Checkpointer(directory, keep=2)
  for step in (10, 20):
    checkpointer.save(step, state_of(step, sharding, replicated), Counter(100 * step + me), {'step': step})
  found['latest'] = checkpointer.latest_valid()
  checkpointer.close()
  found['seals'] = sorted(name for name in os.listdir(f'{directory}/00000020') if name.startswith('seal'))
  sealed = [sorted(json.loads(Path(directory, '00000020', name).read_text())) for name in found['seals']]
  found['shares'] = [sum(name.startswith('state/') for name in names) for names in sealed]
  distributed.barrier('both have looked')
  if me == 0:  # a file of arrays that only the other process looks at
    victim = next(name for name in sorted(sum(sealed, []))[1::2] if '/d/' in name)
    os.truncate(f'{directory}/00000020/{victim}', 3)
  distributed.barrier('20 is damaged')

  counter = Counter(0)
  reader = Checkpointer(directory, keep=2)
  wanted = abstract(state_of(1, sharding, replicated), replicated)
  step, state, metadata = reader.restore(wanted, counter)
  shards = state['kernel'].addressable_shards
  kernels = [np.array_equal(np.asarray(shard.data), 10 * KERNEL[shard.index]) for shard in shards]
  found |= {'step': step, 'metadata': metadata, 'data': counter.position, 'kernels': kernels}
  found['rng'] = np.asarray(jax.random.key_data(state['rng'])).tolist()
  reader.close()

  if me == 0:
    os.makedirs(f'{directory}/local_0')
    os.symlink(f'{directory}/00000010', f'{directory}/local_0/00000010')
  try:
    Checkpointer(f'{directory}/local_{me}', keep=None).latest_valid()
  except CheckpointError as error:
    found['not_shared'] = str(error)
  return found


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
  """(folder, what process 0 found, what process 1 found)"""
  directory = tmp_path_factory.mktemp('shared')
  environment = os.environ | {
      'MMX_COORDINATOR': f'127.0.0.1:{free_port()}',
      'MMX_NUM_PROCESSES': '2',
      'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
      'JAX_PLATFORMS': 'cpu',
  }
  processes = []
  for index in range(2):
    command = [sys.executable, __file__, str(directory)]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    processes.append(subprocess.Popen(command, env=environment | {'MMX_PROCESS_ID': str(index)}, **pipes))
  found = []
  try:
    for process in processes:
      output, errors = process.communicate(timeout=120)
      assert process.returncode == 0, errors[-3000:]
      found.append(json.loads(output.splitlines()[-1]) | {'log': errors})
  finally:
    for process in processes:
      process.kill()
  return directory, *found


def test_two_processes_are_one_program(two_processes):
  _, *found = two_processes
  assert [(each['process'], each['processes'], each['primary']) for each in found] == [(0, 2, True), (1, 2, False)]


def test_local_rows_become_one_global_batch_in_order_of_process(two_processes):
  for found in two_processes[1:]:
    assert found['rows'] == ROWS.tolist()
    assert found['sum'] == ROWS.sum()


@pytest.mark.parametrize('name', MESHES)
def test_every_mesh_gets_each_row_once_from_the_processes_that_hold_it(two_processes, name):
  rows = ROWS[PERMUTED.get(name, range(8)), :4].tolist()
  for found, shard in zip(two_processes[1:], MESHES[name][2], strict=True):
    assert found['fed'][name] == {'shard': list(shard), 'put': rows, 'whole': ROWS[:, :4].tolist()}


def test_a_refused_claim_is_told_by_every_process_in_the_same_words(two_processes):
  first, second = (found['refused'] for found in two_processes[1:])
  assert first == second and 'is in use by process' in first


def test_a_signal_to_one_process_stops_all_at_the_same_step(two_processes):
  _, first, second = two_processes
  assert (first['requested'], second['requested']) == (False, True)
  assert first['agreed'] and second['agreed']
  assert not first['agreed_before'] and not second['agreed_before']


def test_processes_seal_their_shares_and_agree_on_the_newest_whole_checkpoint(two_processes):
  directory, *both = two_processes
  for found in both:
    assert found['latest'] == 20
    assert found['shares'][0] - found['shares'][1] in (0, 1) and found['shares'][1] > 4
    assert found['seals'] == ['seal.0-of-2.json', 'seal.1-of-2.json']
    positions = {'of process 0': 1000, 'of process 1': 1001}
    assert (found['step'], found['metadata'], found['data']) == (10, {'step': 10}, positions)
    assert found['kernels'] == [True, True] and found['rng'] == [10, 5]
  lines = [line for found in both for line in found['log'].splitlines() if 'is damaged and passed over' in line]
  assert len(lines) == 1 and f'{directory}/00000020' in lines[0]


def test_processes_that_do_not_share_a_folder_are_told(two_processes):
  assert all('it must be a shared folder' in found['not_shared'] for found in two_processes[1:])


def test_a_checkpoint_of_two_processes_is_restored_in_one(two_processes):
  directory, _, _ = two_processes
  mesh = Mesh(np.array(jax.devices()[:8]), ('fsdp',))
  replicated = NamedSharding(mesh, PartitionSpec())
  state = state_of(10, NamedSharding(mesh, PartitionSpec('fsdp')), replicated)
  reader = Checkpointer(directory, keep=None)
  step, found, _ = reader.restore(abstract(state, replicated), None)
  assert step == 10 and int(found['step']) == 10
  assert found['kernel'].sharding == state['kernel'].sharding
  np.testing.assert_array_equal(found['kernel'], KERNEL * 10)
  np.testing.assert_array_equal(jax.random.key_data(found['rng']), [10, 5])
  counter = Counter(0)
  reader.restore(abstract(state, replicated), counter)
  assert counter.position == {'of process 0': 1000, 'of process 1': 1001}
  for path in (directory / '00000010').glob('data.*.json'):
    path.rename(path.with_name(f'not.{path.name}'))
  with pytest.raises(CheckpointError, match=r'has no data position$'):
    Checkpointer(directory, keep=None)._data_state(Mark(10))


# One process.


@pytest.fixture
def joined(monkeypatch) -> list:
  """Arguments of each call of jax.distributed.initialize, in an environment that knows of no other process."""
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *arguments, **timeouts: calls.append(arguments))
  for name in list(os.environ):
    if name.startswith(('MMX_', 'SLURM_', 'TPU_', 'GCE_', 'MEGASCALE_')):
      monkeypatch.delenv(name)
  return calls


def test_one_process_joins_nobody(joined, monkeypatch):
  distributed.initialize()
  distributed.initialize('localhost:1', 1, 0)
  monkeypatch.setenv('SLURM_PROCID', '0')
  monkeypatch.setenv('SLURM_NTASKS', '4')  # a batch script outside srun
  distributed.initialize()
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'localhost')
  distributed.initialize()
  assert joined == []
  distributed.barrier('nobody to wait for')
  np.testing.assert_array_equal(distributed.gather([3, 1]), [[3, 1]])


def test_the_environment_and_arguments_name_the_other_processes(joined, monkeypatch):
  distributed.initialize('host:1', 4, 3)
  monkeypatch.setenv('MMX_COORDINATOR', 'other:2')
  monkeypatch.setenv('MMX_NUM_PROCESSES', '2')
  distributed.initialize(process_id=0)
  assert joined == [('host:1', 4, 3), ('other:2', 2, 0)]


@pytest.mark.parametrize('variables', [
    {'SLURM_PROCID': '1', 'SLURM_STEP_NUM_TASKS': '2'},
    {'TPU_WORKER_HOSTNAMES': 't-0,t-1'},
    {'TPU_PROCESS_ADDRESSES': 't-0:8471,t-1:8471', 'TPU_WORKER_HOSTNAMES': 't-0'},
    {'MEGASCALE_NUM_SLICES': '2', 'TPU_WORKER_HOSTNAMES': 't-0'},
])
def test_clusters_that_jax_knows_are_left_to_it(joined, monkeypatch, variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  distributed.initialize()
  assert joined == [()]


@pytest.mark.parametrize('arguments, message', [
    ((None, 2, None), 'MMX_COORDINATOR and MMX_PROCESS_ID must be set too, with MMX_NUM_PROCESSES=2'),
    (('host:1', 2, None), 'MMX_PROCESS_ID must be set too, with MMX_COORDINATOR=host:1, MMX_NUM_PROCESSES=2'),
    (('host:1', 2, 2), 'MMX_PROCESS_ID must be at least 0 and below MMX_NUM_PROCESSES=2, found 2'),
    (('host', 2, 0), "MMX_COORDINATOR must be host:port of process 0, found 'host'"),
    (('host:1', 'two', 0), "must be whole numbers: invalid literal for int() with base 10: 'two'"),
])
def test_half_a_cluster_is_refused(joined, arguments, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    distributed.initialize(*arguments)
  assert joined == []


@contextlib.contextmanager
def metadata_server(monkeypatch, endpoints: str | None):
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      known = self.path.endswith('/worker-network-endpoints') and self.headers['Metadata-Flavor'] == 'Google'
      self.send_response(200 if known and endpoints else 404)
      self.end_headers()
      self.wfile.write((endpoints or '').encode())

    def log_message(self, *_):
      pass

  server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv('GCE_METADATA_IP', f'127.0.0.1:{server.server_port}')
  yield
  server.shutdown()
  server.server_close()


@pytest.mark.parametrize('endpoints, hosts', [('a:b:10.0.0.1,a:b:10.0.0.2', 2), ('a:b:10.0.0.1', 1), (None, 1)])
def test_a_tpu_vm_counts_the_hosts_of_its_slice(joined, monkeypatch, endpoints, hosts):
  with metadata_server(monkeypatch, endpoints):
    assert distributed.metadata_hosts() == hosts
  assert distributed.metadata_hosts() == 1  # nobody listens any more


def test_rows_go_to_the_devices_of_the_axes_named():
  mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ('replica', 'fsdp', 'tensor'))
  spec = PartitionSpec(('replica', 'fsdp'))
  batch = distributed.put_batch({'tokens': ROWS, 'mask': ROWS[:, 0] > 3}, mesh, spec)
  np.testing.assert_array_equal(batch['tokens'], ROWS)
  assert batch['tokens'].sharding == NamedSharding(mesh, spec) and batch['mask'].dtype == bool
  assert {shard.data.shape for shard in batch['tokens'].addressable_shards} == {(2, 6)}
  with pytest.raises(ValueError):
    distributed.put_batch({'tokens': ROWS[:3]}, mesh, spec)


@pytest.mark.parametrize('holders, process, share', [
    ([{0}, {0}, {1}, {1}], 1, (4, (2, 3), 1, 2)),
    ([{0, 1}, {2, 3}], 3, (2, (1,), 1, 2)),
    ([{1}, {0}], 0, (2, (1,), 1, 2)),  # the block that it holds decides, not its number
    ([{0, 1, 2, 3}], 2, (1, (0,), 0, 1)),
])
def test_processes_are_counted_by_the_rows_that_they_hold(holders, process, share):
  assert distributed._share_of(holders, process) == share


@pytest.mark.parametrize('holders, process, message', [
    ([{0}, {0, 1}, {1}], 0, 'process 0 holds 0,1; process 1 holds 1,2; the devices of a process must make up'),
    ([{0}, {0}, {1}], 0, 'process 0 holds 0,1; process 1 holds 2; the devices'),
    ([{0}, {1}], 2, 'process 2 has none of its devices, which are of processes [0, 1]; start fewer processes'),
])
def test_a_mesh_that_cuts_across_processes_is_refused(holders, process, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    distributed._share_of(holders, process)


def test_a_job_whose_processes_do_not_all_come_says_so_and_ends():
  code = 'from mmx import distributed; distributed.CONNECT_TIMEOUT_S = 2; distributed.initialize("127.0.0.1:{}", 2, {})'
  for process in (0, 1):
    command = [sys.executable, '-c', code.format(free_port(), process)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 1 and line.startswith('error: the processes of this job (process 0 at 127.0.0.1:')
    assert line.endswith('did not all meet within 2 s; is each one started, and can it reach process 0?')


# Stops.


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_only_sets_a_flag_and_the_old_handler_returns(number):
  seen = []
  previous = signal.signal(number, lambda *_: seen.append('old'))
  try:
    with distributed.Preemption() as preemption:
      assert (preemption.requested, preemption.signal_name, preemption.agreed()) == (False, None, False)
      os.kill(os.getpid(), number)
      assert (preemption.requested, preemption.signal_name, preemption.agreed()) == (True, number.name, True)
    assert seen == []
    os.kill(os.getpid(), number)
    assert seen == ['old']
  finally:
    signal.signal(number, previous)


def test_the_second_interrupt_is_immediate_and_the_second_sigterm_is_not():
  with distributed.Preemption() as preemption:
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
      os.kill(os.getpid(), number)
    assert preemption.signal_name == 'SIGTERM'
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)


def test_handlers_return_after_an_exception():
  before = signal.getsignal(signal.SIGTERM)
  with contextlib.suppress(ZeroDivisionError), distributed.Preemption():
    1 / 0
  assert signal.getsignal(signal.SIGTERM) is before


if __name__ == '__main__':
  print(json.dumps(worker(sys.argv[1])))
