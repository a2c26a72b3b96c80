"""Config: gin text, overrides, patterns, validation, experiment files, and golden copies of everything that resolves.

After a change that is meant, `UPDATE_GOLDEN=1 pytest tests/test_config.py -n 0` rewrites configs/base.gin and
tests/golden/*.gin; read the difference before committing it.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from mmx import config, flops, gin_syntax
from mmx.config import ConfigError, Experiment, Layer, Segment

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / 'tests/golden'
UPDATE = 'UPDATE_GOLDEN' in os.environ
MODELS = sorted((ROOT / 'configs/models').glob('*.gin'))
EXPERIMENTS = sorted((ROOT / 'experiments').glob('*.py'))


def written(tmp_path, text, name='x.gin'):
  file = tmp_path / name
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(text)
  return file


def message(function, *args, **kwargs):
  """The text of the ConfigError that the call must raise; always one line."""
  with pytest.raises(ConfigError) as caught:
    function(*args, **kwargs)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def changed(**overrides):
  """Default experiment with `model__d_model=…` overrides."""
  return config.override(Experiment(), {path.replace('__', '.'): value for path, value in overrides.items()})


# --- golden copies ----------------------------------------------------------------------------------------------------


def resolved():
  """{golden file name: experiment} of every model file, and of every arm of every experiment at each scale."""
  found = {f'models.{path.stem}.gin': config.load(path) for path in MODELS}
  for path in EXPERIMENTS:
    scales = config.load_experiment(path).scales
    for scale in scales:
      for arm, experiment in config.load_experiment(path, scale).arms.items():
        found[f'{path.stem}.{scale}.{arm}.gin'] = experiment
  return found


def compare(file, text):
  if UPDATE:
    file.write_text(text)
  assert file.is_file() and file.read_text() == text, f'{file} is not up to date; {__doc__.splitlines()[2]}'


def test_resolved_configs_equal_their_golden_copies():
  experiments = resolved()
  for name, experiment in experiments.items():
    compare(GOLDEN / name, config.dump(experiment))
  assert {file.name for file in GOLDEN.glob('*.gin')} == set(experiments), 'a golden copy of nothing, delete it'


def test_base_gin_is_generated_from_the_schema():
  compare(ROOT / 'configs/base.gin', gin_syntax.annotated_defaults())
  assert config.load(ROOT / 'configs/base.gin') == Experiment()


def test_every_config_and_arm_is_valid():
  for name, experiment in resolved().items():
    assert config.validate(experiment) is experiment, name
  for path in (ROOT / 'configs/scales').glob('*.gin'):
    config.load(path)


# --- gin text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('experiment', [
    Experiment(),
    changed(
        name='a-b.c', data__source="text:it's \"quoted\" \\ and\nfolded ü", optim__eps=1e-15, optim__learning_rate=3,
        model__tie_embeddings=True, mesh__fsdp=-1, model__pattern='full/dense*3 (full full/dense)*2',
    ),
])  # fmt: skip
def test_config_round_trip(tmp_path, experiment):
  assert config.load(written(tmp_path, config.dump(experiment))) == experiment


def test_block_dotted_macro_and_include_forms_agree(tmp_path):
  written(tmp_path, 'WIDTH = 64\nmodel.d_model = %WIDTH\nmodel.moe.top_k = 1\n', 'parts/inner.gin')
  file = written(tmp_path, """
      # A comment.
include 'parts/inner.gin'
name = 'outer'  # a field of the root
HALF = 4
TOP = %HALF

model.moe:
  # Inside a block.
  top_k = %TOP

  num_experts = 200_0  # digits may be grouped
train.steps = 3000
""")
  expected = {'name': 'outer', 'model.d_model': 64, 'model.moe.top_k': 4, 'model.moe.num_experts': 2000}
  assert config.load(file) == config.override(Experiment(), {**expected, 'train.steps': 3000})


def test_last_value_of_a_macro_counts_everywhere(tmp_path):
  written(tmp_path, 'D = 128\nmodel.d_model = %D\n', 'inner.gin')
  assert config.load(written(tmp_path, "include 'inner.gin'\nD = 256\n")).model.d_model == 256


def test_lower_case_top_level_name_is_a_field_and_never_a_macro(tmp_path):
  assert message(config.load, written(tmp_path, 'steps = 5\n')) == (
      f'{tmp_path}/x.gin:1: steps: unknown field; did you mean train.steps?'
  )


@pytest.mark.parametrize('text, line, said', [
    ('model.moe.num_expert = 3', 1, 'model.moe.num_expert: unknown field; did you mean model.moe.num_experts?'),
    ('\n\nmodel.moe:\n  top_k = 2\n  num_expert = 3', 5, 'did you mean model.moe.num_experts?'),
    ('model.num_heads = 3', 1, 'did you mean model.attention.num_heads or model.lightning.num_heads?'),
    ('modle.d_model = 3', 1, 'did you mean model.d_model?'),
    ('optim.lr = 3', 1, 'optim.lr: unknown field; optim has name, learning_rate, schedule'),
    ('zebra = 3', 1, 'zebra: unknown field; an experiment has name, model, data'),
    ('model.moe = 3', 1, 'model.moe: is a group of fields, not a field; set one of them, such as model.moe.num_exp'),
    ('train.steps = 3.0', 1, 'train.steps = 3.0: expected int, found float'),
    ('train.steps = True', 1, 'train.steps = True: expected int, found bool'),
    ("optim.eps = '1e-8'", 1, "optim.eps = '1e-8': expected float, found str"),
    ('optim.eps = False', 1, 'expected float, found bool'),
    ('model.tie_embeddings = 1', 1, 'model.tie_embeddings = 1: expected bool, found int'),
    ('name = 3', 1, 'name = 3: expected str, found int'),
    ("optim.schedule = 'cosin'", 1, "allowed are 'wsd', 'cosine', 'constant'; did you mean 'cosine'?"),
    ('optim.schedule = cosine', 1, "Failed to parse token 'cosine'; expected path.to.field = literal, text in quotes"),
    ('train.steps = %STEPS\nSTEP = 3', 1, 'unknown macro %STEPS; did you mean %STEP?'),
    ('A = %B\nB = %A\ntrain.steps = %A', 3, 'macro A is defined by itself'),
    ('train.steps = 1\n\ntrain.steps = 2', 3, 'train.steps is already set in line 1 of this file'),
    ('train.steps = @five()', 1, 'there are no references here'),
    ('big/train.steps = 5', 1, "scope 'big'"),
    ('import os', 1, 'a config file imports nothing'),
    ('\ntrain.steps = 5 6', 2, 'Expected newline'),
    ('train.steps = (5,', None, 'expected path.to.field = literal'),
    ("\ninclude 'none.gin'", 2, 'include none.gin: no such file'),
    ('train:\n  steps = 0', 2, 'train.steps = 0: must be positive'),
    ("model.d_model = 3\nmodel.pattern = 'full*0'", 2, 'column 6: expected a number of repeats, at least 1, found 0'),
    ('model.attention:\n  num_heads = 6\n  num_kv_heads = 4', 3,
     'model.attention.num_heads = 6: does not divide by model.attention.num_kv_heads = 4'),
    ('data.batch_size = 12\nmesh.fsdp = 8\ntrain.seed = 1', 2, 'its 12 rows per microbatch do not divide'),
])  # fmt: skip
def test_error_names_file_line_and_nearest_name(tmp_path, text, line, said):
  file = written(tmp_path, text + '\n')
  found = message(config.load, file)
  assert found.startswith(f'{file}:{line}: ' if line else f'{file}:') and said in found


def test_error_inside_an_include_names_the_included_file(tmp_path):
  inner = written(tmp_path, '\ntrain.step = 5\n', 'inner.gin')
  file = written(tmp_path, "include 'inner.gin'\n")
  assert message(config.load, file) == f'{inner}:2: train.step: unknown field; did you mean train.steps?'


def test_shapes_that_do_not_divide_name_the_line_that_came_last(tmp_path):
  inner = written(tmp_path, 'model.attention.num_kv_heads = 3\n', 'inner.gin')
  heads = 'model.attention.num_kv_heads = 4\nmodel.attention.num_heads = 8\n'
  file = written(tmp_path, heads + "include 'inner.gin'\n")
  assert message(config.load, file).startswith(f'{inner}:1: model.attention.num_heads = 8: does not divide by')


def test_include_cycle_is_refused(tmp_path):
  written(tmp_path, "include 'x.gin'\n", 'y.gin')
  file = written(tmp_path, "include 'y.gin'\n")
  assert message(config.load, file).startswith(f'{tmp_path}/y.gin:1: include x.gin: includes itself')


def test_missing_file_names_the_nearest_and_unreadable_text_the_file(tmp_path):
  file = written(tmp_path, '', 'small.gin')
  assert message(config.load, tmp_path / 'smal.gin') == f'{tmp_path}/smal.gin: no such file; did you mean {file}?'
  file.write_bytes(b'name = \xff')
  assert message(config.load, file).startswith(f'{file}: cannot be read')


def test_configs_are_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  written(tmp_path, "include 'configs/models/moe_cpu.gin'\n")
  assert config.load('x.gin') == config.load('configs/models/moe_cpu.gin')
  assert config.load_experiment('experiments/moe_ablation.py').name == 'moe_ablation'


# --- overrides --------------------------------------------------------------------------------------------------------


def test_override_copies_and_diff_lists_what_changed():
  base = Experiment()
  other = config.override(base, {'model.moe.top_k': 8, 'optim.learning_rate': 1, 'train.steps': 200})
  assert base == Experiment()
  assert config.diff(base, other) == [('model.moe.top_k', 2, 8), ('optim.learning_rate', 0.003, 1.0)]
  assert type(other.optim.learning_rate) is float
  assert config.to_flat_dict(other)['model.moe.top_k'] == 8
  assert message(config.override, base, {'model.moe.topk': 8}) == (
      'model.moe.topk: unknown field; did you mean model.moe.top_k?'
  )


@pytest.mark.parametrize('text, expected', [
    ('train.steps=50', ('train.steps', 50)),
    ('mesh.fsdp=-1', ('mesh.fsdp', -1)),
    (' optim.learning_rate = 1e-3 ', ('optim.learning_rate', 1e-3)),
    ('optim.schedule=cosine', ('optim.schedule', 'cosine')),
    ("optim.schedule='cosine'", ('optim.schedule', 'cosine')),
    ('model.pattern=(full*2 full/dense)*2', ('model.pattern', '(full*2 full/dense)*2')),
    ('data.source=text:/a=b@0.5', ('data.source', 'text:/a=b@0.5')),
    ('name=123', ('name', '123')),
    ('model.tie_embeddings=True', ('model.tie_embeddings', True)),
])  # fmt: skip
def test_assignments_take_literals_and_bare_words(text, expected):
  assert config.parse_assignment(text) == expected


@pytest.mark.parametrize('text, said', [
    ('train.steps', '--set train.steps: expected path=value'),
    ('train.steps=many', "--set train.steps = 'many': expected int, found str"),
    ('train.stes=5', '--set train.stes: unknown field; did you mean train.steps?'),
    ('optim.schedule=cosin', "did you mean 'cosine'?"),
    ('model.tie_embeddings=true', "--set model.tie_embeddings = 'true': expected bool"),
])  # fmt: skip
def test_bad_assignment_names_set(text, said):
  assert said in message(config.parse_assignment, text) and message(config.parse_assignment, text).startswith('--set ')


# --- patterns ---------------------------------------------------------------------------------------------------------


def test_each_top_level_item_of_a_pattern_is_one_segment():
  moe, dense = Layer('full', 'moe'), Layer('full', 'dense')
  assert config.parse_pattern('full*62') == (Segment((moe,), 62),)
  assert config.parse_pattern(' full/dense*3 (full*2 (full/dense full)*2)*10 full') == (
      Segment((dense,), 3), Segment((moe, moe, dense, moe, dense, moe), 10), Segment((moe,), 1),
  )  # fmt: skip
  assert config.num_layers('full/dense*3 (full*2 (full/dense full)*2)*10 full') == 64


@pytest.mark.parametrize('pattern, column, said', [
    ('', 1, 'expected a layer, found the end'),
    ('full ful', 6, 'expected a mixer (full, sliding, lightning, msa), found ful'),
    ('full/moo', 1, 'expected full/ and a feed-forward (moe, dense)'),
    ('full/', 1, 'expected full/ and a feed-forward (moe, dense)'),
    ('full*0', 6, 'expected a number of repeats, at least 1, found 0'),
    ('full*', 6, 'found the end'),
    ('full*-1', 6, 'found -1'),
    ('(full full', 11, "expected ')' for the '(' of column 1"),
    ('full)', 5, 'expected a layer or the end'),
    ('()*2', 2, 'expected a layer, found )'),
    ('full*2*3', 7, 'expected a layer, found *'),
])  # fmt: skip
def test_bad_pattern_names_the_column(pattern, column, said):
  found = message(config.parse_pattern, pattern)
  assert found.startswith(f'model.pattern = {pattern!r}, column {column}: ') and said in found


def test_patterns_and_layers_know_the_same_mixers():
  from mmx.layers import mixer

  assert set(config.MIXERS) == set(mixer.MIXERS)


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('path', [path for path, kind in config.FIELDS.items() if kind in (int, float)])
def test_every_number_has_a_range(path):
  bad = [-2, 0] if path not in config.MAY_BE_ZERO else [-2]
  for value in bad:
    assert path in message(config.validate, config.override(Experiment(), {path: value}))
  if config.FIELDS[path] is float:
    assert 'finite' in message(config.validate, config.override(Experiment(), {path: float('nan')}))


@pytest.mark.parametrize('overrides, said', [
    (dict(model__attention__rotary_dim=7), 'rotary_dim = 7: must be even and at most model.attention.head_dim = 32'),
    (dict(model__attention__rotary_dim=34), 'rotary_dim = 34: must be even and at most'),
    (dict(model__moe__top_k=33), 'model.moe.top_k = 33: more than model.moe.num_experts = 32'),
    (dict(model__mtp__depth=255), 'model.mtp.depth = 255: looks past data.seq_len = 256'),
    (dict(train__accumulate=3), 'data.batch_size = 16: does not divide by train.accumulate = 3'),
    (dict(train__accumulate=4), 'per microbatch do not divide by mesh.replica * mesh.fsdp * mesh.expert = 1 * 8 * 1'),
    (dict(mesh__expert=8, model__moe__num_experts=12), 'moe.num_experts = 12: does not divide by mesh.expert = 8'),
    (dict(mesh__tensor=4), 'model.attention.num_kv_heads = 2: does not divide by mesh.tensor = 4'),
    (dict(mesh__tensor=2, model__moe__d_ff=63), 'model.moe.d_ff = 63: does not divide by mesh.tensor = 2'),
    (dict(mesh__tensor=2, model__moe__shared_d_ff=63), 'moe.shared_d_ff = 63: does not divide by mesh.tensor = 2'),
    (dict(mesh__tensor=2, model__d_ff=63, model__pattern='full/dense'), 'model.d_ff = 63: does not divide'),
    (dict(data__heldout_fraction=1.0), 'data.heldout_fraction = 1.0: must be below 1'),
    (dict(optim__final_lr_ratio=1.5), 'optim.final_lr_ratio = 1.5: must be at most 1'),
    (dict(train__seed=2**32), 'train.seed = 4294967296: must be below 4294967296'),
    (dict(train__steps=79), 'optim.warmup_steps = 20 + optim.decay_steps = 60: longer than train.steps = 79'),
    (dict(train__steps=19, optim__schedule='cosine'), 'optim.warmup_steps = 20: longer than train.steps = 19'),
    (dict(name='a/b'), "name = 'a/b': must be letters"),
    (dict(mesh__num_devices=9), 'mesh.num_devices = 9: more than the 8 device(s) that exist'),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_named(overrides, said):
  assert said in message(config.validate, changed(**overrides), num_devices=8)


@pytest.mark.parametrize('overrides', [
    dict(mesh__tensor=2, model__d_ff=63),  # no dense layer uses it
    dict(mesh__expert=8, model__moe__num_experts=12, model__moe__top_k=1, model__pattern='full/dense'),  # nor experts
    dict(train__steps=79, optim__schedule='constant'),  # decay_steps means nothing there
    dict(model__attention__rotary_dim=0),
    dict(optim__warmup_steps=140),
])  # fmt: skip
def test_what_is_not_used_is_not_refused(overrides):
  experiment = changed(**overrides)
  assert config.validate(experiment, num_devices=8) is experiment


def test_mesh_takes_what_is_left():
  def mesh(*sizes, num_devices=0):
    return config.MeshConfig(*sizes, num_devices=num_devices)

  assert config.resolve_mesh(mesh(1, -1, 2, 2), 16) == {'replica': 1, 'fsdp': 4, 'expert': 2, 'tensor': 2, 'context': 1}
  assert config.resolve_mesh(mesh(1, -1, 2, 1, num_devices=4), 16)['fsdp'] == 2
  assert config.resolve_mesh(mesh(1, 2, 2, 1), 4) == {'replica': 1, 'fsdp': 2, 'expert': 2, 'tensor': 1, 'context': 1}
  for bad, said in [
      (mesh(1, 8, 8, 1), 'asks for 64 devices: more than the 16 at hand'),
      (mesh(1, 2, 2, 1), 'set mesh.num_devices = 4 or one axis to -1'),
      (mesh(1, -1, 3, 1), '16 does not divide by 3'),
      (mesh(-1, -1, 1, 1), 'mesh.replica and mesh.fsdp are both -1'),
      (mesh(1, 0, 1, 1), 'mesh.fsdp = 0: must be positive, or -1'),
      (mesh(num_devices=17), 'mesh.num_devices = 17: more than the 16 device(s) that exist'),
  ]:
    assert said in message(config.resolve_mesh, bad, 16)


# --- experiment files -------------------------------------------------------------------------------------------------

MINIMAL = """
from mmx.config import Experiment

def get_config(scale):
  return Experiment()
"""


def test_experiment_file_defaults(tmp_path):
  file = config.load_experiment(written(tmp_path, '"""A question?\n\n  More.\n"""' + MINIMAL, 'q.py'), 'any')
  assert (file.name, file.arms, file.seeds, file.metric) == ('q', {'main': Experiment()}, (0,), 'heldout_loss')
  assert file.doc == 'A question?\n\nMore.' and file.published == '' and file.scales == ('any',)


def test_gin_file_is_an_experiment_of_one_arm(tmp_path):
  path = written(tmp_path, 'train.seed = 7\n')
  file = config.load_experiment(path)
  assert file.arms == {'main': changed(train__seed=7)} and file.seeds == (7,) and file.scales == ('cpu',)
  assert 'a .gin file has no scales' in message(config.load_experiment, path, 'h200')


@pytest.mark.parametrize('text, said', [
    ('x = 1\n', 'q.py: lacks get_config(scale)'),
    ('SCALES = ("cpu", "pod")' + MINIMAL.replace('cpu', ''), "q.py: unknown scale 'huge'; it has cpu, pod"),
    (MINIMAL + '\n1 / 0\n', 'q.py:7: ZeroDivisionError: division by zero'),
    (MINIMAL + '\ndef (\n', 'q.py:7: SyntaxError'),
    (MINIMAL.replace('Experiment()', 'scales[scale]'), "q.py:5: NameError: name 'scales' is not defined"),
    (MINIMAL.replace('return Experiment()', 'return None'), 'returned NoneType, not an Experiment'),
    (MINIMAL + 'def arms(base):\n  return [base]\n', 'q.py: arms(base) must return {name: Experiment}'),
    (MINIMAL + 'def arms(base):\n  return {}\n', 'q.py: arms(base) must return {name: Experiment}'),
    (MINIMAL + 'from mmx import config\ndef arms(base):\n  return {"a": config.override(base, {"train.stes": 1})}\n',
     'q.py:8: train.stes: unknown field; did you mean train.steps?'),
])  # fmt: skip
def test_broken_experiment_file_ends_in_one_line(tmp_path, text, said):
  assert said in message(config.load_experiment, written(tmp_path, text, 'q.py'), 'huge')


def test_missing_or_foreign_experiment_file_is_named(tmp_path):
  assert message(config.load_experiment, 'experiments/moe_ablatoin.py') == (
      'experiments/moe_ablatoin.py: no such file; did you mean experiments/moe_ablation.py?'
  )
  assert 'a .py or a .gin file' in message(config.load_experiment, written(tmp_path, '', 'x.yaml'))


def test_two_experiments_of_one_name_do_not_clash(tmp_path):
  before = set(sys.modules)
  one = config.load_experiment(written(tmp_path, MINIMAL.replace('()', '(name="one")'), 'a/q.py'))
  two = config.load_experiment(written(tmp_path, MINIMAL.replace('()', '(name="two")'), 'b/q.py'))
  assert (one.base.name, two.base.name) == ('one', 'two')
  assert not any('q' == name.rpartition('.')[2] for name in set(sys.modules) - before)


def test_unknown_arm_lists_the_arms():
  file = config.load_experiment('experiments/moe_ablation.py')
  assert config.select_arm(file, 'e128_top8').model.moe.num_experts == 128
  found = message(config.select_arm, file, 'e64')
  assert found == "moe_ablation has no arm 'e64'; its arms are e32_top2, e128_top8"


@pytest.mark.parametrize('scale', ['cpu', 'h200', 'v5p_64'])
def test_moe_ablation_arms_differ_in_the_cut_of_the_experts_alone(scale):
  file = config.load_experiment('experiments/moe_ablation.py', scale)
  coarse, fine = file.arms.values()
  assert [path for path, _, _ in config.diff(coarse, fine)] == [
      'model.moe.num_experts', 'model.moe.top_k', 'model.moe.d_ff',
  ]  # fmt: skip
  flops.assert_comparable({name: arm.model for name, arm in file.arms.items()})
  assert fine.model.moe.top_k * fine.model.moe.d_ff == coarse.model.moe.top_k * coarse.model.moe.d_ff


def test_published_scale_runs_the_published_models():
  arms = config.load_experiment('experiments/moe_ablation.py', 'v5p_64').arms
  for name, arm in arms.items():
    assert arm.model == config.load(f'configs/models/m2_ablation_{name}.gin').model


def test_config_imports_neither_jax_nor_gin():
  code = 'import sys, mmx.config, mmx.flops; sys.exit(bool({"jax", "gin", "flax"} & set(sys.modules)))'
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
