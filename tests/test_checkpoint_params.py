"""Parameters alone: out of a training run, written piece by piece, into any placement, and never of another model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx.checkpoint import Checkpointer, CheckpointError
from mmx.checkpoint_params import Parameters, ParametersWriter, restore_params


def sharded(num_devices, *axes):
  return NamedSharding(Mesh(np.array(jax.devices()[:num_devices]), ('fsdp',)), PartitionSpec(*axes))


def variables(seed=0):
  random = np.random.default_rng(seed)
  draw = lambda *shape: random.normal(size=shape).astype(np.float32)
  layer = {'mixer': {'w_q': draw(3, 8, 4), 'w_k': draw(3, 8, 2)}, 'ffn_norm': {'scale': draw(3, 8)}}
  return {
      'params': {'embedding': {'table': draw(16, 8)}, 'segment_0': {'layer_0': layer}},
      'router': {'segment_0': {'layer_0': {'ffn': {'bias': draw(3, 4)}}}},
  }


def abstract(tree, place=lambda leaf: None):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)), tree)


def assert_equal(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
    np.testing.assert_array_equal(np.asarray(_at(found, path)), leaf, err_msg=jax.tree_util.keystr(path))


def _at(tree, path):
  for key in path:
    tree = tree[key.key]
  return tree


@pytest.fixture
def trained(tmp_path):
  """A run folder of training: optimizer state and step beside the parameters, which eight devices share."""
  for step in (5, 9):
    tree = variables(seed=step)
    put = lambda leaf: jax.device_put(leaf, sharded(8, *(['fsdp'] if leaf.shape[0] % 8 == 0 else [])))
    state = jax.tree.map(put, tree) | {'step': jnp.int32(step), 'opt_state': jax.tree.map(put, tree['params'])}
    checkpoints = Checkpointer(tmp_path / 'run/checkpoints', keep=2)
    checkpoints.save(step, state, None, {})
    checkpoints.close()
  return tmp_path / 'run'


@pytest.fixture
def written(tmp_path):
  """The same parameters as step 9 of `trained`, written a layer at a time."""
  tree = variables(seed=9)
  with ParametersWriter(tmp_path / 'written', abstract(tree), PIECES) as writer:
    write_all(writer, tree)
  return tmp_path / 'written'


PIECES = {'params/segment_0/layer_0/mixer/w_q': (1, 8, 4)}


def write_all(writer, tree):
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = '/'.join(key.key for key in path)
    if name in PIECES:
      for row, values in enumerate(leaf):
        writer.write(name, (row,), values)
    else:
      writer.write(name, (slice(None),), leaf)


@pytest.mark.parametrize('kind', ['trained', 'written'])
@pytest.mark.parametrize('num_devices', [1, 4])
def test_parameters_arrive_in_the_placement_asked_for(kind, num_devices, request):
  tree = variables(seed=9)
  place = lambda leaf: sharded(num_devices, None, *(['fsdp'] if leaf.ndim > 1 and leaf.shape[1] % 4 == 0 else []))
  found, missing = restore_params(request.getfixturevalue(kind), abstract(tree, place))
  assert not missing
  assert_equal(found, tree)
  for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(abstract(tree, place)), strict=True):
    assert leaf.sharding == wanted.sharding


def test_what_is_written_in_pieces_is_read_by_the_checkpointer(written):
  tree = variables(seed=9)
  reader = Checkpointer(written / 'checkpoints', keep=None)
  step, state, _ = reader.restore(abstract(tree), None)
  reader.close()
  assert step == 0
  assert_equal(state, tree)


def test_a_chunk_on_disk_never_spans_two_devices(tmp_path):
  tree = variables()
  place = lambda leaf: sharded(4, None, *(['fsdp'] if leaf.ndim == 3 else []))
  with ParametersWriter(tmp_path, abstract(tree, place), PIECES) as writer:
    write_all(writer, tree)
  array = Parameters(tmp_path).open('params/segment_0/layer_0/mixer/w_q')
  assert array.chunk_layout.read_chunk.shape == (1, 2, 4)


@pytest.mark.parametrize('kind', ['trained', 'written'])
def test_what_the_checkpoint_lacks_comes_from_the_default_and_is_named(kind, request):
  """A model with an index branch starts from one without."""
  tree = variables(seed=9)
  tree['params']['segment_0']['layer_0']['mixer']['w_index_q'] = np.full((3, 8, 2), 7, np.float32)
  folder = request.getfixturevalue(kind)
  with pytest.raises(CheckpointError, match='it lacks params/segment_0/layer_0/mixer/w_index_q$'):
    restore_params(folder, abstract(tree))
  found, missing = restore_params(folder, abstract(tree), default=jax.tree.map(lambda leaf: leaf * 1, tree))
  assert missing == ['params/segment_0/layer_0/mixer/w_index_q']
  assert_equal(found, tree)


def test_another_model_is_refused_with_every_name(trained):
  wide, extra = variables(), variables()
  for name in ('w_q', 'w_k'):
    wide['params']['segment_0']['layer_0']['mixer'][name] = np.zeros((3, 9, 4), np.float32)
  with pytest.raises(CheckpointError, match=r'w_k is \[3, 8, 2\] there, \[3, 9, 4\] here, .*w_q is'):
    restore_params(trained, abstract(wide))
  del extra['params']['segment_0']
  with pytest.raises(CheckpointError, match='unknown here are .*ffn_norm/scale, .*w_k, .*w_q'):
    restore_params(trained, abstract(extra), default=extra)


def test_modules_for_training_only_may_stay_behind(tmp_path):
  tree = variables()
  with ParametersWriter(tmp_path, abstract(tree), {}) as writer:
    write_all(writer, tree)
  del tree['params']['segment_0']
  with pytest.raises(CheckpointError, match='unknown here'):
    restore_params(tmp_path, abstract(tree))
  tree = variables()
  tree['params']['mtp_0'] = {'w_project': np.ones((4, 2), np.float32)}
  with ParametersWriter(tmp_path / 'mtp', abstract(tree), {}) as writer:
    write_all(writer, tree)
  del tree['params']['mtp_0']
  assert_equal(restore_params(tmp_path / 'mtp', abstract(tree))[0], tree)


def test_a_folder_without_a_whole_checkpoint_is_refused(tmp_path, written):
  with pytest.raises(CheckpointError, match='no whole checkpoint'):
    restore_params(tmp_path / 'nowhere', abstract(variables()))
  chunk = next(written.glob('checkpoints/00000000/state/params/**/0.0.0'))
  chunk.write_bytes(chunk.read_bytes()[:-1] + b'\x00')
  with pytest.raises(CheckpointError, match='no whole checkpoint'):
    restore_params(written, abstract(variables()))


def test_a_writer_that_fails_leaves_nothing_and_overwrites_nothing(tmp_path, written):
  with pytest.raises(KeyError):
    with ParametersWriter(tmp_path / 'new', abstract(variables()), {}) as writer:
      writer.write('nonsense', (0,), np.zeros(3))
  assert not (tmp_path / 'new/checkpoints').exists()
  with pytest.raises(CheckpointError, match='holds checkpoints already'):
    ParametersWriter(written, abstract(variables()), {})
