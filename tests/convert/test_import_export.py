"""Whole folders in and out: bit for bit, in little memory, onto any mesh, and nothing written that does not fit."""

import contextlib
import io
import json
import pathlib
import re
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

import folders

from mmx import checkpoint, checkpoint_params, config, sharding
from mmx.checkpoint import Checkpointer, CheckpointError
from mmx.config import ConfigError
from mmx.convert import __main__ as command, importer, safetensors_io
from mmx.convert.exporter import export_checkpoint
from mmx.convert.importer import import_checkpoint
from mmx.convert.mapping import to_theirs

NAMINGS = [(name, number) for name, family in folders.FAMILIES.items() for number in range(len(family.namings))]


def quietly(function, *args, **options):
  """Runs it and returns what it said."""
  said = []
  function(*args, **options, say=said.append)
  return said


def restored(run, mesh=None):
  model = config.load(run / 'config.gin').model
  return model, checkpoint_params.restore_params(run, checkpoint_params.abstract_variables(model, mesh))[0]


def arrays_of(folder):
  stored = safetensors_io.read_index(folder)
  return {name: safetensors_io.read(stored, name) for name in stored}


def assert_equal(found, wanted):
  assert found.keys() == wanted.keys()
  for name in wanted:
    np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.parametrize('name, naming', NAMINGS)
def test_import_and_export_give_back_every_bit(name, naming, tmp_path):
  family, model = folders.FAMILIES[name], folders.model(name)
  weights = folders.write(tmp_path / 'hf', family, model, naming)
  quietly(import_checkpoint, tmp_path / 'hf', tmp_path / 'run')
  found, variables = restored(tmp_path / 'run')
  assert_equal(to_theirs(found, family.namings[naming], variables), weights)

  quietly(export_checkpoint, tmp_path / 'run', tmp_path / 'out', max_shard_bytes=6_000)
  assert len(list((tmp_path / 'out').glob('*.safetensors'))) > 2
  assert_equal(arrays_of(tmp_path / 'out'), to_theirs(found, family.namings[0], variables))
  quietly(import_checkpoint, tmp_path / 'out', tmp_path / 'again')
  again, same = restored(tmp_path / 'again')
  assert again == found
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, variables))


def test_bfloat16_goes_out_but_for_the_router(tmp_path):
  family, model = folders.FAMILIES['m2'], folders.model('m2')
  weights = folders.write(tmp_path / 'hf', family, model)
  quietly(import_checkpoint, tmp_path / 'hf', tmp_path / 'run')
  quietly(export_checkpoint, tmp_path / 'run', tmp_path / 'out', 'bfloat16')
  stored = safetensors_io.read_index(tmp_path / 'out')
  assert json.loads((tmp_path / 'out/config.json').read_text())['dtype'] == 'bfloat16'
  for name, array in weights.items():
    router = name.endswith(('block_sparse_moe.gate.weight', 'e_score_correction_bias'))
    assert stored[name].code == ('F32' if router else 'BF16'), name
    wanted = array if router else array.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(safetensors_io.read(stored, name), wanted)
  quietly(import_checkpoint, tmp_path / 'out', tmp_path / 'again')
  assert config.load(tmp_path / 'again/config.gin').model.compute_dtype == 'bfloat16'


@pytest.mark.parametrize('name', folders.FAMILIES)
def test_a_mesh_holds_what_one_device_holds(name, tmp_path):
  """Straight from the files, and through a run folder whose chunks were cut for the mesh."""
  family, model = folders.FAMILIES[name], folders.model(name, d_model=16, moe__num_experts=4)
  folders.write(tmp_path / 'hf', family, model)
  mesh_fields = {'mesh.fsdp': 2, 'mesh.expert': 2, 'mesh.tensor': 2}
  quietly(import_checkpoint, tmp_path / 'hf', tmp_path / 'one')
  quietly(import_checkpoint, tmp_path / 'hf', tmp_path / 'eight', mesh_fields)
  _, wanted = restored(tmp_path / 'one')
  experiment = config.load(tmp_path / 'eight/config.gin')
  mesh = sharding.build_mesh(experiment.mesh)
  abstract = checkpoint_params.abstract_variables(experiment.model, mesh)
  plan = importer.make_plan(tmp_path / 'hf', family, experiment.model)
  for variables in (importer.load(plan, abstract), checkpoint_params.restore_params(tmp_path / 'eight', abstract)[0]):
    for found, place, one in zip(*map(jax.tree.leaves, (variables, abstract, wanted)), strict=True):
      assert found.sharding == place.sharding
      np.testing.assert_array_equal(found, one)
  saved = checkpoint_params.Parameters(tmp_path / 'eight')
  split = 0
  for leaf, place in checkpoint.named_leaves(abstract)[0].items():
    local = place.sharding.shard_shape(place.shape)
    assert all(chunk <= size for chunk, size in zip(saved.open(leaf).chunk_layout.read_chunk.shape, local))
    split += local != place.shape
  assert split > 3


def test_an_import_is_a_checkpoint_like_any_other(tmp_path):
  family, model = folders.FAMILIES['m2'], folders.model('m2')
  folders.write(tmp_path / 'hf', family, model)
  quietly(import_checkpoint, tmp_path / 'hf', tmp_path / 'run', {'train.steps': 500, 'optim.learning_rate': 1e-4})
  experiment = config.load(tmp_path / 'run/config.gin')
  assert experiment.train.steps == 500 and experiment.optim.learning_rate == 1e-4
  reader = Checkpointer(tmp_path / 'run/checkpoints', keep=None)
  step, variables, _ = reader.restore(checkpoint_params.abstract_variables(experiment.model), None)
  reader.close()
  assert step == 0
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), variables, restored(tmp_path / 'run')[1]))
  with pytest.raises(CheckpointError, match='holds checkpoints already'):
    quietly(import_checkpoint, tmp_path / 'hf', tmp_path / 'run')


def test_files_of_the_tokenizer_travel_along(tmp_path):
  family, model = folders.FAMILIES['m2'], folders.model('m2')
  folders.write(tmp_path / 'hf', family, model)
  fields = json.loads((tmp_path / 'hf/config.json').read_text())
  folders.write_config(tmp_path / 'hf', fields | {'eos_token_id': 7, 'max_position_embeddings': 99})
  beside = {'tokenizer.json': '{}', 'tokenizer_config.json': '{}', 'chat_template.jinja': 'x', 'merges.txt': 'a b'}
  for file, text in (beside | {'README.md': 'not a tokenizer'}).items():
    (tmp_path / 'hf' / file).write_text(text)
  quietly(import_checkpoint, tmp_path / 'hf', tmp_path / 'run')
  experiment = config.load(tmp_path / 'run/config.gin')
  assert experiment.data.tokenizer == str(tmp_path / 'run/tokenizer.json')
  quietly(export_checkpoint, tmp_path / 'run', tmp_path / 'out')
  for file, text in beside.items():
    assert (tmp_path / 'out' / file).read_text() == text
  assert not (tmp_path / 'out/README.md').exists()
  out = json.loads((tmp_path / 'out/config.json').read_text())
  assert out['eos_token_id'] == 7 and out['max_position_embeddings'] == 99


# --- what does not fit ------------------------------------------------------------------------------------------------


def spoil(folder, arrays):
  arrays = dict(arrays)
  del arrays['model.layers.2.self_attn.q_proj.weight'], arrays['model.norm.weight']
  arrays['model.layers.0.self_attn.sinks'] = np.zeros(3, np.float32)
  arrays['model.layers.1.mlp.bias'] = np.zeros(3, np.float32)
  arrays['lm_head.weight'] = arrays['lm_head.weight'][:-1]
  arrays['model.layers.0.self_attn.k_norm.weight'] = np.zeros(12, np.int32)
  arrays['model.layers.0.self_attn.v_proj.weight'] = np.zeros((12, 10), ml_dtypes.float8_e4m3fn)
  folders.write_arrays(folder, arrays)


def test_every_tensor_that_does_not_fit_is_named_and_nothing_is_written(tmp_path):
  family, model = folders.FAMILIES['m2'], folders.model('m2')
  spoil(tmp_path / 'hf', folders.write(tmp_path / 'hf', family, model))
  with pytest.raises(ConfigError) as told:
    quietly(import_checkpoint, tmp_path / 'hf', tmp_path / 'run')
  message = str(told.value)
  assert '\n' not in message
  for part in (
      '2 missing: model.norm.weight, model.layers.2.self_attn.q_proj.weight;',
      '2 unknown: model.layers.0.self_attn.sinks, model.layers.1.mlp.bias;',
      '1 of another shape: lm_head.weight is [18, 10], not [19, 10];',
      '1 of a dtype that is not read: model.layers.0.self_attn.k_norm.weight is I32;',
      '1 F8_E4M3 without _scale_inv: model.layers.0.self_attn.v_proj.weight',
  ):
    assert part in message, part
  assert not (tmp_path / 'run').exists()


def test_what_could_be_scaled_in_several_ways_is_not_read(tmp_path):
  """float8 of three axes, and float8 scales."""
  family, model = folders.FAMILIES['m2'], folders.model('m2')
  arrays = folders.write(tmp_path / 'hf', family, model, naming=1)
  fused, plain = 'model.layers.0.mlp.experts.down_proj', 'model.layers.0.self_attn.v_proj.weight'
  for name in (fused, plain):
    arrays[name] = arrays[name].astype(ml_dtypes.float8_e4m3fn)
  arrays[plain + '_scale_inv'] = np.ones((1, 1), ml_dtypes.float8_e4m3fn)
  folders.write_arrays(tmp_path / 'hf', arrays)
  with pytest.raises(ConfigError, match=f'2 of a dtype that is not read: {fused} is F8_E4M3, {plain}_scale_inv is'):
    quietly(import_checkpoint, tmp_path / 'hf', tmp_path / 'run')


def test_scales_of_another_shape_or_of_nothing_are_named(tmp_path):
  family, model = folders.FAMILIES['m2'], folders.model('m2')
  arrays = folders.write(tmp_path / 'hf', family, model)
  name = 'model.layers.0.self_attn.v_proj.weight'
  arrays[name] = arrays[name].astype(ml_dtypes.float8_e4m3fn)
  arrays[name + '_scale_inv'] = np.ones((1, 2), np.float32)
  arrays['lm_head.weight_scale_inv'] = np.ones((1, 1), np.float32)
  folders.write_arrays(tmp_path / 'hf', arrays)
  message = r'unknown: lm_head.weight_scale_inv; .*v_proj.weight_scale_inv is \[1, 2\], not'
  with pytest.raises(ConfigError, match=message):
    quietly(import_checkpoint, tmp_path / 'hf', tmp_path / 'run')


@pytest.mark.parametrize('name, naming, extra, kind', [
    ('m3', 1, 'vision_tower.vision_model.pre_layrnorm.weight', 'vision'),
    ('m3', 1, 'patch_merge_mlp.linear_1.bias', 'vision'),
    ('m3', 1, 'language_model.model.mtp.layers.0.eh_proj.weight', 'multi-token prediction'),
    ('text01', 0, 'model.layers.0.self_attn.slope_rate', 'decays'),
    ('m2', 0, 'model.layers.0.self_attn.rotary_emb.inv_freq', 'rotary frequencies'),
])
def test_what_import_does_not_need_is_left_behind_and_counted(name, naming, extra, kind, tmp_path):
  family, model = folders.FAMILIES[name], folders.model(name)
  arrays = folders.write(tmp_path / 'hf', family, model, naming)
  folders.write_arrays(tmp_path / 'hf', arrays | {extra: np.zeros(3, np.float32)})
  said = quietly(import_checkpoint, tmp_path / 'hf', tmp_path / 'run')
  assert said[0].startswith(f'left behind: 1 tensors ({kind}')
  other = 'm2' if name != 'm2' else 'text01'
  if name != 'm2':  # it is the family that does not need it
    arrays = folders.write(tmp_path / 'other', folders.FAMILIES[other], folders.model(other))
    folders.write_arrays(tmp_path / 'other', arrays | {extra: np.zeros(3, np.float32)})
    with pytest.raises(ConfigError, match=f'1 unknown: {extra}'):
      quietly(import_checkpoint, tmp_path / 'other', tmp_path / 'no')


def trained(folder, model, change=lambda variables: variables):
  """A run folder of `model` with random parameters, as training would leave it."""
  random = np.random.default_rng(0)
  variables = jax.tree.map(
      lambda leaf: random.normal(size=leaf.shape).astype(np.float32), checkpoint_params.abstract_variables(model))
  checkpoints = Checkpointer(folder / 'checkpoints', keep=1)
  checkpoints.save(7, change(variables) | {'opt_state': np.ones(3, np.float32)}, None, {})
  checkpoints.close()
  (folder / 'config.gin').write_text(config.dump(config.Experiment(model=model)))
  return variables


def test_a_trained_model_goes_out_without_its_mtp_modules(tmp_path):
  model = folders.model('m2', mtp__depth=1)
  variables = trained(tmp_path / 'run', model)
  said = quietly(export_checkpoint, tmp_path / 'run', tmp_path / 'out')
  assert 'MTP modules' in said[0] and 'of step 7' in said[1]
  assert_equal(arrays_of(tmp_path / 'out'), to_theirs(model, folders.FAMILIES['m2'].namings[0], variables))


def test_expert_biases_that_a_family_lacks_are_refused_unless_they_are_0(tmp_path):
  model = folders.model('text01')
  trained(tmp_path / 'biased', model)
  with pytest.raises(ConfigError, match='has nothing that could hold router/segment_0/layer_0/ffn/bias'):
    quietly(export_checkpoint, tmp_path / 'biased', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
  zeroed = lambda variables: variables | {'router': jax.tree.map(np.zeros_like, variables['router'])}
  trained(tmp_path / 'plain', model, zeroed)
  quietly(export_checkpoint, tmp_path / 'plain', tmp_path / 'out')


@pytest.mark.parametrize('name, overrides, message', [
    ('m2', {'key_shift': 'learned'}, r"model.key_shift = 'learned': MiniMax-M2 has 'none' only"),
    ('m2', {'pattern': 'full sliding'}, r"pattern = 'full sliding': MiniMax-M2 has layers full/moe only"),
    ('m2', {'moe__gate': 'softmax'}, r"model.moe.gate = 'softmax': MiniMax-M2 has 'sigmoid' only"),
    ('text01', {'attention__qk_norm': 'per_head'}, r"qk_norm = 'per_head': MiniMax-Text-01 has 'none' only"),
    ('m3', {'activation': 'swiglu'}, r"model.activation = 'swiglu': MiniMax-M3 has 'swiglu_oai' only"),
])
def test_a_model_of_no_family_is_not_exported(name, overrides, message, tmp_path):
  trained(tmp_path / 'run', folders.model(name, **overrides))
  with pytest.raises(ConfigError, match=message):
    quietly(export_checkpoint, tmp_path / 'run', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_weights_are_not_overwritten(tmp_path):
  family, model = folders.FAMILIES['m2'], folders.model('m2')
  folders.write(tmp_path / 'hf', family, model)
  quietly(import_checkpoint, tmp_path / 'hf', tmp_path / 'run')
  with pytest.raises(ConfigError, match='holds weights already'):
    quietly(export_checkpoint, tmp_path / 'run', tmp_path / 'hf')


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('line, message', [
    ('', 'the following arguments are required: import'),
    ('swap a b', "invalid choice: 'swap'"),
    ('import {tmp}/nowhere {tmp}/run', r'nowhere/config.json: No such file'),
    ('import {tmp}/hf {tmp}/run --set model.d_modle=3', 'did you mean model.d_model'),
    ('import {tmp}/hf {tmp}/run --set model.d_model=12', 'of another shape'),
    ('import {tmp}/hf {tmp}/run --set model.mtp.depth=1', 'has nothing for params/mtp_0'),
    ('import {tmp}/hf {tmp}/run --set model.norm=gemma', "model.norm = 'gemma': MiniMax-M2 has 'rms' only"),
    ('export {tmp}/hf {tmp}/out', 'config.gin: no such file'),
    ('export {tmp}/hf {tmp}/out --max_shard_size 5XB', "'5XB' is no size"),
    ('export {tmp}/hf {tmp}/out --dtype float8', "invalid choice: 'float8'"),
    ('verify {tmp}/hf --reference {tmp}/none.npz', 'none.npz: No such file'),
    ('verify {tmp}/hf --reference {tmp}/hf/config.json', 'not an .npz file'),
    ('verify {tmp}/hf --reference {tmp}/half.npz', 'half.npz: lacks logits; it has tokens'),
    ('verify {tmp}/hf --reference {tmp}/flat.npz', r'expected integer tokens \[B, T\]'),
    ('verify {tmp}/hf --reference {tmp}/other.npz', 'logits of 20 tokens; the model has 19'),
])
def test_what_a_person_can_mend_is_told_in_one_line(line, message, tmp_path):
  folders.write(tmp_path / 'hf', folders.FAMILIES['m2'], folders.model('m2'))
  np.savez(tmp_path / 'half.npz', tokens=np.zeros((1, 3), int))
  np.savez(tmp_path / 'flat.npz', tokens=np.zeros(3, int), logits=np.zeros((3, 19)))
  np.savez(tmp_path / 'other.npz', tokens=np.zeros((1, 3), int), logits=np.zeros((1, 3, 20)))
  with pytest.raises(SystemExit) as told, contextlib.redirect_stderr(io.StringIO()):
    command.main(line.format(tmp=tmp_path).split())
  assert isinstance(told.value.code, str) and told.value.code.startswith('error: ')
  assert '\n' not in told.value.code
  assert re.search(message, told.value.code), told.value.code


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import pathlib, sys, threading
from mmx.convert.exporter import export_checkpoint
from mmx.convert.importer import import_checkpoint

def resident():  # MiB, of now; the peak that the system keeps is that of starting up
  return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * 4096 / 2**20

def growth(function):
  seen, over = [resident()], threading.Event()
  def watch():
    while not over.wait(0.001):
      seen.append(resident())
  watcher = threading.Thread(target=watch)
  watcher.start()
  try:
    function()
  finally:  # a thread that went on would keep this process
    over.set()
    watcher.join()
  return max(seen) - seen[0]

folder, quiet = pathlib.Path(sys.argv[1]), lambda line: None
import_checkpoint(folder / 'small', folder / 'small_run', {}, quiet)  # loads every library
export_checkpoint(folder / 'small_run', folder / 'small_out', say=quiet)
print(growth(lambda: import_checkpoint(folder / 'big', folder / 'big_run', {}, quiet)))
print(growth(lambda: export_checkpoint(folder / 'big_run', folder / 'big_out', 'float32', 10**9, quiet)))
"""


def test_memory_is_that_of_single_tensors(tmp_path):
  """A checkpoint of 300 MB, whose largest stacked parameter has 200 MB and largest tensor 2 MB."""
  big = folders.model('m2', d_model=512, moe__d_ff=1024, moe__num_experts=16, vocab_size=64)
  weights = folders.write(tmp_path / 'big', folders.FAMILIES['m2'], big, max_shard_bytes=10**9)
  total = sum(array.nbytes for array in weights.values()) / 2**20
  assert total > 280
  del weights
  folders.write(tmp_path / 'small', folders.FAMILIES['m2'], folders.model('m2'))
  root = pathlib.Path(__file__).parents[2]
  ran = subprocess.run([sys.executable, '-c', MEASURE, tmp_path], capture_output=True, text=True, cwd=root)
  assert ran.returncode == 0, ran.stderr
  imported, exported = map(float, ran.stdout.split())
  print(f'{total:.0f} MiB: import grew by {imported:.0f} MiB, export by {exported:.0f}')
  assert imported < 100 and exported < 100
