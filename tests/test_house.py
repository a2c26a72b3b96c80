"""The plan of the house, kept: who imports whom, what stays light, how long a file gets, what every experiment proves.

Whoever adds a room, a mixer, an experiment or a kernel meets its rule here.
"""

import ast
import contextlib
import functools
import pathlib
import re
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import pytest

from mmx import config, sharding, train_step
from mmx.kernels_pallas import api

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / 'mmx').rglob('*.py'))
CHAPTERS = [path for folder in ('mmx', 'tests', 'scripts', 'experiments') for path in (ROOT / folder).rglob('*.py')]

# Each room, from the ground up, and the rooms below that it may use.
MAY_IMPORT = {
    '__init__': '',
    'schema': '',
    'config': 'schema',
    'gin_syntax': 'config',
    'command': 'config',
    'flops': 'config',
    'metrics': '',
    'report': 'metrics',
    'sharding': 'config',
    'claim': 'config metrics',
    'distributed': 'config claim sharding',
    'watch': 'metrics distributed',
    'checkpoint': 'distributed',
    'data': 'config',
    'kernels_pallas': '',
    'layers': 'config sharding kernels_pallas',
    'model': 'config layers',
    'checkpoint_params': 'config checkpoint sharding model',
    'convert': 'config command gin_syntax data sharding checkpoint model checkpoint_params',
    'generate': 'config command data sharding model checkpoint checkpoint_params',
    'evals': 'config command metrics report distributed sharding data model checkpoint checkpoint_params generate',
    'loss': 'sharding',
    'optimizer': 'config',
    'spikes': '',
    'train_step': 'config sharding layers model loss optimizer spikes',
    'hlo': '',
    'topology': 'config',
    'proof': 'config flops hlo topology sharding layers model train_step',
    'aot': 'config command topology proof',
    'host': '',
    'goodput': '',
    'profiler': 'config',
    'run': 'config',
    'train': (
        'config command host goodput profiler run flops metrics report watch distributed checkpoint checkpoint_params '
        'sharding data train_step evals'
    ),
    'launch': 'config command flops metrics report run train evals',
    'sweep': 'config launch',
}
# Parsing gin text is a file of its own, which `config.load` calls and which fills in the schema of config.
CYCLES = {('config', 'gin_syntax')}
# Each of these takes 0.3 s or more to import, or a GPU's memory: only inside the function that needs it, or not at all.
NEVER = ('tensorflow', 'torch', 'transformers', 'torch_xla')
LATE = ('tensorboard', 'matplotlib', 'tokenizers', 'array_record', 'tqdm')


def shown(path):
  return str(path.relative_to(ROOT))


def room_of(path):
  return path.relative_to(ROOT / 'mmx').parts[0].removesuffix('.py')


def imports(path, nested=True):
  """Dotted names that a file imports: 'mmx.data.pipeline', also from `from mmx.data import pipeline`."""
  tree = ast.parse(path.read_text())
  for node in ast.walk(tree) if nested else tree.body:
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{shown(path)}:{node.lineno}: imports are absolute'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


# --- imports ----------------------------------------------------------------------------------------------------------


def test_imports_run_downhill():
  for path in FILES:
    room = room_of(path)
    assert room in MAY_IMPORT, f'{shown(path)}: a new room; say in tests/test_house.py what it stands on'
    for name in imports(path):
      if name.startswith('mmx.'):
        other = name.split('.')[1]
        allowed = other == room or other in MAY_IMPORT[room].split() or (room, other) in CYCLES
        assert allowed, f'{shown(path)} imports {name}: {room} stands on {MAY_IMPORT[room] or "nothing"}'


def test_every_room_stands_on_rooms_below_it():
  below = set()
  for room, others in MAY_IMPORT.items():
    assert set(others.split()) <= below, f'{room} is listed below what it stands on'
    below.add(room)
  assert below == {room_of(path) for path in FILES}


def test_nothing_imports_experiments_scripts_or_tests():
  for path in FILES:
    assert not {name.split('.')[0] for name in imports(path)} & {'experiments', 'scripts', 'tests', 'tiny'}, shown(path)


def test_other_frameworks_are_imported_nowhere_and_heavy_tools_late():
  for path in FILES:
    assert not {name.split('.')[0] for name in imports(path)} & set(NEVER), shown(path)
    assert not {name.split('.')[0] for name in imports(path, nested=False)} & {*NEVER, *LATE}, shown(path)


@pytest.mark.parametrize('names', ['mmx', 'mmx, mmx.config, mmx.sweep, mmx.flops', 'mmx.train'])
def test_import_stays_light(names):
  heavy = ('jax', 'flax', 'optax', 'orbax', 'grain', 'scipy', 'gin', *NEVER, *LATE)
  code = f'import sys, {names}; print(*(set({heavy}) & sys.modules.keys()))'
  found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
  assert found.stdout.strip() == ''


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_a_chapter():
  for path in CHAPTERS:
    limit = 800 if 'kernels_pallas' in path.parts else 600
    lines = path.read_text().count('\n')
    assert lines <= limit, f'{shown(path)} has {lines} lines'
    assert path.stem not in ('utils', 'util', 'helpers', 'misc', 'common'), f'{shown(path)}: name what it is about'


def test_what_is_public_and_long_says_what_it_is():
  """Every file; and every public function, class and method of more than ten lines."""
  for path in FILES:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), shown(path)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith('_')]
    for node in [*tree.body, *(member for one in classes for member in one.body)]:
      if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith('_'):
        trivial = node.end_lineno - node.lineno < 10
        assert trivial or ast.get_docstring(node), f'{shown(path)}:{node.lineno}: {node.name} says nothing of itself'


# --- experiments ------------------------------------------------------------------------------------------------------


EXPERIMENTS = sorted((ROOT / 'experiments').glob('*.py'))
# By default every scale of the experiment that the README begins with; the others take 10 to 30 s each to trace.
QUICK = [('moe_ablation', scale) for scale in ('cpu', 'h200', 'v5p_64')]
ALL = [(path.stem, scale) for path in EXPERIMENTS for scale in config.load_experiment(path).scales]
SCALES = [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in ALL]


def abstract_batch(experiment):
  shape = experiment.data.batch_size, experiment.data.seq_len
  fields = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ('tokens', 'targets', 'segment_ids', 'positions')}
  return fields | {'loss_mask': jax.ShapeDtypeStruct(shape, jnp.float32)}


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_says_what_it_asks_and_what_it_costs(path):
  file = config.load_experiment(path)
  for word in ('Arms', 'Metric', 'Source', 'Cost'):
    assert re.search(rf'^{word}\b', file.doc, re.MULTILINE), f'{shown(path)}: the docstring has no paragraph {word}'


@pytest.mark.parametrize('name, scale', SCALES)
def test_every_experiment_builds_and_its_cpu_scale_lowers(name, scale):
  """Big scales are traced by shape alone, on a mesh of one CPU device, which has no kernels of other chips; nothing is
  compiled.
  """
  forms = {f'model.{part}.implementation': 'auto' for part in ('attention', 'sliding', 'lightning', 'msa', 'moe')}
  for arm in config.load_experiment(ROOT / f'experiments/{name}.py', scale).arms.values():
    one = {f'mesh.{axis}': 1 for axis in config.MESH_AXES} | {'mesh.num_devices': 1}
    experiment = config.validate(config.override(arm, one | forms), num_devices=8)
    mesh = sharding.build_mesh(experiment.mesh)
    state = train_step.abstract_state(experiment, mesh)
    step = train_step.make_train_step(experiment, mesh)
    if scale == 'cpu':
      lowered = jax.jit(step).lower(state, abstract_batch(experiment))
      after, metrics = lowered.out_info
    else:
      after, metrics = jax.eval_shape(step, state, abstract_batch(experiment))
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(lambda leaf: leaf.shape, state)
    assert {'loss', 'grad_norm', 'learning_rate', 'load'} <= metrics.keys()


# --- the ladder of kernels --------------------------------------------------------------------------------------------


KERNEL_TESTS = '\n'.join(path.read_text() for path in (ROOT / 'tests/kernels').glob('test_*.py'))
FIELDS = {
    'attention': config.AttentionConfig, 'experts': config.MoEConfig, 'sliding': config.SlidingConfig,
    'lightning': config.LightningConfig, 'msa': config.MSAConfig,
}  # fmt: skip
LIBRARY = ('splash', 'cudnn', 'megablox')  # somebody else's kernel behind our signature
KERNELS = [
    (what, name)
    for what, group in FIELDS.items()
    for name in typing.get_args(group.__dataclass_fields__['implementation'].type)
    if name not in ('auto', 'reference')
]


def called(what, implementation, platform):
  """A gradient through the api at a shape that every implementation takes, traced for a platform, and its arguments."""
  array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  ids = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
  choice = {'implementation': implementation, 'platform': platform}
  attention = array((2, 256, 4, 128)), array((2, 256, 2, 128)), array((2, 256, 2, 128)), ids((2, 256))
  differentiated = (0, 1, 2)
  if what == 'attention':
    arguments = attention
    function = lambda q, k, v, segments: api.attend(q, k, v, segments, **choice)
  elif what == 'sliding':
    arguments = *attention, ids((2, 256))
    function = lambda *arguments: api.sliding(*arguments, window=64, sink_tokens=0, **choice)
  elif what == 'lightning':
    arguments = *(array((2, 256, 4, 128)),) * 3, jax.ShapeDtypeStruct((4,), jnp.float32), ids((2, 256))
    function = lambda *arguments: api.lightning(*arguments, chunk=128, **choice)[0]
  elif what == 'msa':
    q, k, v, segments = attention
    arguments = q, k, v, array((2, 256, 2, 64)), array((2, 256, 64)), segments
    function = lambda *arguments: sum(jnp.sum(x) for x in api.msa(*arguments, block_size=64, top_k=2, **choice))
    differentiated = (0, 1, 2, 3, 4)
  else:
    arguments = array((256, 128)), ids((256, 2)), array((256, 2)), *(array((4, 128, 128)),) * 3
    function = functools.partial(api.experts, **choice)
    differentiated = (0, 2, 3, 4, 5)
  total = lambda *arguments: jnp.sum(function(*arguments).astype(jnp.float32))
  return jax.jit(jax.grad(total, differentiated)), arguments


@pytest.mark.parametrize('what', FIELDS)
def test_schema_and_api_name_the_same_implementations(what):
  function, arguments = called(what, 'nonesuch', 'cpu')
  with pytest.raises(ValueError, match='is unknown; one of') as told:
    function.trace(*arguments)
  offered = set(ast.literal_eval(str(told.value).partition('one of ')[2]))
  assert offered == {name for kind, name in KERNELS if kind == what} | {'reference'}


@pytest.mark.parametrize('what', FIELDS)
def test_rung_1_the_oracle_is_held_against_a_slow_loop(what):
  assert f'reference.{what}' in KERNEL_TESTS and f'def slow_{what}' in KERNEL_TESTS


@pytest.mark.parametrize('what, name', KERNELS)
def test_rung_2_each_form_is_held_against_the_oracle(what, name):
  """By name in tests/kernels: a library kernel without an interpreter can only be, through the api, on its hardware."""
  assert f'{what}_{name}' in KERNEL_TESTS or name in LIBRARY and f"'{name}'" in KERNEL_TESTS


KERNEL_FILES = {
    path.stem: path.read_text() for path in sorted((ROOT / 'mmx/kernels_pallas').glob('*_[tg]pu.py'))
}
OURS = [name for name, text in KERNEL_FILES.items() if re.search(r'pl\.pallas_call|pl(gpu)?\.kernel|\.launch\(', text)]
AOT_TESTS = [path.read_text() for path in (ROOT / 'tests/aot').glob('test_*.py')]


@pytest.mark.parametrize('kernel', OURS)
def test_rungs_2_3_and_5_our_kernels_are_interpreted_poisoned_and_compiled_ahead_of_time(kernel):
  interpreted = (ROOT / f'tests/kernels/test_{kernel}.py').read_text()
  assert re.search(r'interpret=True|in interpret mode|simulator\(', interpreted) and re.search(r'\bnan\b', interpreted)
  compiler = 'compile_for_hopper' if kernel.endswith('_gpu') else 'compile_for_tpu'
  assert any(re.search(rf'\b{kernel}\b', text) and compiler in text for text in AOT_TESTS)


# A kernel's lowering asks what chip it is for, and would find this host's CPU.
DEVICES = {'tpu': ('TPU v5p', 2, 'tpu'), 'gpu': ('NVIDIA H100 80GB HBM3', 132, 'gpu')}
CHIPS = {
    platform: jax.sharding.AbstractMesh((1,), ('chip',), abstract_device=jax.sharding.AbstractDevice(*device))
    for platform, device in DEVICES.items()
}


@pytest.mark.parametrize('what, name', KERNELS)
def test_rung_4_each_form_lowers_for_the_platforms_it_names(what, name):
  served = []
  for platform, target in (('cpu', 'cpu'), ('gpu', 'cuda'), ('tpu', 'tpu')):
    function, arguments = called(what, name, platform)
    with jax.sharding.use_abstract_mesh(CHIPS[platform]) if platform in CHIPS else contextlib.nullcontext():
      try:
        traced = function.trace(*arguments)
      except ValueError as error:
        assert f'not for {platform}' in str(error)
        continue
      except RuntimeError as error:
        if 'cuDNN is not detected' not in str(error):
          raise
        pytest.skip('jax asks the installed cuDNN for its version before it traces')
      assert traced.lower(lowering_platforms=(target,)).as_text()
    served.append(platform)
  assert served, f'{name} serves no platform'
