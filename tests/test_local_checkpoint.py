"""Checkpoints on every host's own disk: exact, and only where each process has its part."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx import distributed
from mmx.checkpoint import Checkpointer

KERNEL = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
SHARED_STEP, OWN_STEP = 10, 20


def mesh_of(*sizes) -> Mesh:
  return Mesh(np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes), ('fsdp', 'tensor'))


def state_of(step: int, mesh: Mesh) -> dict:
  """Arrays split over both axes, over one, and over none, as parameters, moments and counters are."""
  specs = {'both': ('fsdp', 'tensor'), 'rows': ('fsdp',), 'columns': (None, 'tensor'), 'whole': ()}
  make = lambda spec: jax.make_array_from_callback(
      KERNEL.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda index: KERNEL[index] * step
  )
  return {name: make(spec) for name, spec in specs.items()}


def abstract(state) -> dict:
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def exact(state, step) -> bool:
  """Whether every piece on this process's devices is the saved one."""
  pieces = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
  return all(np.array_equal(np.asarray(piece.data), KERNEL[piece.index] * step) for piece in pieces)


class Position:
  """A data iterator as far as a checkpoint is concerned."""

  def __init__(self, value):
    self.value = value

  def get_state(self):
    return {f'process {jax.process_index()}': self.value}

  def set_state(self, state):
    self.value = state[f'process {jax.process_index()}']


def stores(folder, state):
  own = Checkpointer(f'{folder}/host{jax.process_index()}', keep=1, own=abstract(state))
  return Checkpointer(f'{folder}/shared', keep=2), own


def worker(folder: str, action: str) -> dict:
  """One of two processes with two devices each; what it finds goes to the test as JSON."""
  distributed.initialize()
  me = jax.process_index()
  if me == 1:
    os.makedirs = slowly(os.makedirs)
  state = state_of(1, mesh_of(2, 2))
  if action == 'save':
    shared, own = stores(folder, state)
    for step, store in ((SHARED_STEP, shared), (15, own), (OWN_STEP, own)):
      store.save(step, state_of(step, mesh_of(2, 2)), Position(100 * step + me), {'step': step})
    shared.close()
    own.close()
    return {'marks': sorted(os.listdir(own.directory))}
  found = {}
  for case in sorted(os.listdir(folder)):
    shared, own = stores(f'{folder}/{case}', state)
    steps = [store.latest_valid() for store in (shared, own)]
    position = Position(None)
    step, restored, metadata = (own if steps[1] else shared).restore(abstract(state), position)
    found[case] = [steps[1], step, metadata['step'], position.value - me, exact(restored, step)]
    own.save(OWN_STEP, restored, position, {})
    shared.close()
    own.close()
    found[case].append(sorted(os.listdir(own.directory)))
  return found


def slowly(function):
  """As on a disk slower than the other host's."""
  def slow(*args, **kwargs):
    time.sleep(0.5)
    return function(*args, **kwargs)

  return slow


def run_two(*arguments) -> list[dict]:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  processes = []
  for index in range(2):
    environment = os.environ | {
        'XLA_FLAGS': '--xla_force_host_platform_device_count=2', 'JAX_PLATFORMS': 'cpu',
        'MMX_COORDINATOR': f'127.0.0.1:{port}', 'MMX_NUM_PROCESSES': '2', 'MMX_PROCESS_ID': str(index),
    }
    command = [sys.executable, __file__, *map(str, arguments)]
    processes.append(subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True))
  answers = [process.communicate(timeout=120) for process in processes]
  assert not any(process.returncode for process in processes), '\n'.join(log for _, log in answers)
  return [json.loads(out.splitlines()[-1]) for out, _ in answers]


def damage(path):
  largest = max((file for file in path.rglob('*') if file.is_file()), key=lambda file: file.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)


def test_two_hosts_restore_their_own_parts_or_none_of_them(tmp_path):
  cases = {'intact': tmp_path / 'cases/intact'}
  assert run_two(cases['intact'], 'save') == [{'marks': [f'{OWN_STEP:08d}']}] * 2
  for name in ('lost', 'flipped', 'unsealed'):
    cases[name] = shutil.copytree(cases['intact'], tmp_path / f'cases/{name}')
  part = f'host1/{OWN_STEP:08d}'
  shutil.rmtree(cases['lost'] / part)
  damage(cases['flipped'] / part)
  (cases['unsealed'] / part / 'seal.0-of-1.json').unlink()
  found = run_two(tmp_path / 'cases', 'restore')
  assert found[0] == found[1]
  again = [f'{OWN_STEP:08d}.1']  # under a name of its own: parts of two jobs never look like one checkpoint
  assert found[0].pop('intact') == [OWN_STEP, OWN_STEP, OWN_STEP, 100 * OWN_STEP, True, again]
  for case, told in found[0].items():
    assert told == [None, SHARED_STEP, SHARED_STEP, 100 * SHARED_STEP, True, again], case


def test_another_placement_is_passed_over(tmp_path, caplog):
  state = state_of(OWN_STEP, mesh_of(4, 2))
  store = Checkpointer(tmp_path, keep=1, own=abstract(state))
  store.save(OWN_STEP, state, None, {})
  store.close()
  again = Checkpointer(tmp_path, keep=1, own=abstract(state))
  assert exact(again.restore(abstract(state), None)[1], OWN_STEP)
  again.close()
  other = state_of(1, mesh_of(2, 2))
  reader = Checkpointer(tmp_path, keep=None, own=abstract(other))
  assert reader.latest_valid() is None
  assert 'it is of another mesh or number of processes' in caplog.text


def test_a_mesh_whose_parts_orbax_would_not_keep_is_refused(tmp_path, monkeypatch):
  """Of shards it keeps those of one replica; where they are not all, the rest would come back as zeros."""
  from mmx import checkpoint

  state = state_of(1, mesh_of(4, 2))
  shards = state['rows'].addressable_shards
  assert len(checkpoint._own_shards(state['rows'])) == 4

  class Mixed:
    addressable_shards = [shards[0], shards[3]]  # rows 0 of replica 0, rows 1 of replica 1

  assert shards[0].replica_id != shards[3].replica_id and shards[0].index != shards[3].index
  with pytest.raises(checkpoint.CheckpointError, match='train.local_checkpoint_every = 0'):
    checkpoint._own_shards(Mixed)


if __name__ == '__main__':
  print(json.dumps(worker(*sys.argv[1:])))
