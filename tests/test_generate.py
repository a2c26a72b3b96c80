"""Invariants of generation, through `Decoder.apply` with a cache and through the command's functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from one_mixer import variables

from mmx import config, generate, sharding
from mmx.data import tokenizer
from mmx.model import Decoder, init_cache

PATTERNS = ['full*2', '(sliding full)*2', '(lightning full/dense)*2 lightning', 'full/dense msa*2']


def model_of(pattern, **overrides):
  few = {
      'model.sliding.window': 5, 'model.sliding.sink_tokens': 2, 'model.lightning.num_heads': 4,
      'model.lightning.head_dim': 8, 'model.lightning.chunk': 4, 'model.msa.block_size': 4, 'model.msa.top_k': 2,
      'model.msa.index_dim': 8,
  }  # fmt: skip
  overrides = {path.replace('__', '.'): value for path, value in overrides.items()}
  return config.override(tiny.BASE, {'model.pattern': pattern} | few | overrides).model


def logits(out):
  return np.asarray(out.hidden @ out.head)


@pytest.mark.parametrize('pattern, key_shift', [
    ('sliding full', 'none'),
    # 20 s and more; tests of the layers say as much of each mixer alone.
    *(pytest.param(pattern, 'none', marks=pytest.mark.slow) for pattern in PATTERNS),
    pytest.param('sliding lightning/dense msa full', 'learned', marks=pytest.mark.slow),
])
def test_decode_equals_prefill_equals_training(pattern, key_shift):
  """Rows of unequal length, cut into chunks with padding behind the shorter one, then token by token."""
  model = model_of(pattern, model__key_shift=key_shift)
  tree, lengths, T = variables(model), (23, 17), 23
  tokens = jax.random.randint(jax.random.key(3), (2, T), 0, model.vocab_size)
  slot = jnp.arange(T, dtype=jnp.int32)[None].repeat(2, 0)
  real = (slot < jnp.array(lengths)[:, None]).astype(jnp.int32)
  decoder = Decoder(model)
  wanted = logits(jax.jit(decoder.apply)(tree, tokens, slot, real))
  step = jax.jit(lambda cache, *inputs: decoder.apply(tree, *inputs, cache))
  got, cache = np.zeros_like(wanted), init_cache(model, 2, 32)
  for start, end in [(0, 9), (9, 18), *((t, t + 1) for t in range(18, T))]:
    out = step(cache, *(a[:, start:end] for a in (tokens, slot, real)))
    got[:, start:end], cache = logits(out), out.cache
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(got[row, :length], wanted[row, :length], rtol=0, atol=2e-5 * np.abs(wanted).max())


def naive(model, tree, prompt, count):
  """Greedy continuation by running the whole model again for every token, padded so that it compiles once."""
  length, tokens = 32, list(prompt)
  slot = jnp.arange(length, dtype=jnp.int32)[None]
  whole = jax.jit(Decoder(model).apply)
  for _ in range(count):
    array = jnp.asarray([tokens + [0] * (length - len(tokens))], jnp.int32)
    out = whole(tree, array, slot, (slot < len(tokens)).astype(jnp.int32))
    tokens.append(int(logits(out)[0, len(tokens) - 1].argmax()))
  return tokens[len(prompt) :]


def test_rows_of_a_batch_continue_as_they_do_alone(monkeypatch):
  monkeypatch.setattr(generate, 'PREFILL_CHUNK', 8)  # so that the longer prompt takes several
  model = tiny.BASE.model
  tree, prompts = variables(model), [[5, 9, 2], list(range(3, 22))]
  found = np.stack(list(generate.generate(model, tree, prompts, 6)), axis=1)
  for row, prompt in zip(found, prompts):
    assert row.tolist() == naive(model, tree, prompt, 6)


def test_a_row_that_ended_repeats_the_end_and_all_ended_is_the_end():
  model, tree = tiny.BASE.model, variables(tiny.BASE.model)
  first = naive(model, tree, [5, 9, 2], 8)
  eos = first[3]
  found = np.stack(list(generate.generate(model, tree, [[5, 9, 2]], 8, eos_id=eos)), axis=1)[0].tolist()
  assert found == first[: first.index(eos) + 1]


def test_a_prompt_outside_the_vocabulary_is_refused():
  model = tiny.BASE.model
  for prompt in ([], [61], [-1]):
    with pytest.raises(config.ConfigError, match='from 0 to 60'):
      next(generate.generate(model, {}, [prompt], 1))


def test_sampling_keeps_the_likeliest_and_the_fewest_that_hold_top_p():
  probability = np.array([0.05, 0.4, 0.25, 0.2, 0.1])
  rows = jnp.log(jnp.asarray(probability, jnp.float32))[None].repeat(4000, 0)
  draw = lambda **kinds: np.asarray(generate.sample(rows, jax.random.key(0), generate.Sampling(**kinds)))
  assert set(draw(temperature=0.0)) == {1}
  assert set(draw(vocab_size=1)) == {0} and set(draw(vocab_size=2, temperature=1.0)) == {0, 1}
  assert set(draw(temperature=1.0, top_k=3)) == {1, 2, 3}
  assert set(draw(temperature=1.0, top_p=0.6)) == {1, 2}  # 0.4 is not enough, 0.65 is
  assert set(draw(temperature=1.0, top_p=1e-6)) == {1}
  counts = np.bincount(draw(temperature=1.0), minlength=5) / 4000
  np.testing.assert_allclose(counts, probability, atol=0.03)
  sharper = probability**2 / np.sum(probability**2)
  np.testing.assert_allclose(np.bincount(draw(temperature=0.5), minlength=5) / 4000, sharper, atol=0.03)


def test_a_character_is_told_when_it_is_whole():
  vocabulary = tokenizer.ByteTokenizer()
  text = 'aé€😀z'
  assert list(generate.stream_text(vocabulary, iter(vocabulary.encode(text).tolist()))) == list(text)
  broken = list(generate.stream_text(vocabulary, iter([0x61, 0xFF, 0x62])))
  assert ''.join(broken) == 'a\ufffdb'


@pytest.mark.parametrize('arguments, said', [
    ([], 'the following arguments are required: --checkpoint'),
    (['--checkpoint=.'], '.: no config.gin here; give the folder of a run'),
    (['--checkpoint=.', '--temperature=-1'], 'expected --max_new_tokens >= 1, --temperature >= 0'),
    (['--checkpoint=.', '--top_k=many'], "argument --top_k: invalid int value: 'many'"),
])
def test_bad_input_ends_in_one_line(tmp_path, monkeypatch, arguments, said):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as stopped:
    generate.main(arguments)
  assert str(stopped.value).startswith(f'error: {said}') and '\n' not in str(stopped.value)


def test_generation_compiles_for_the_device_it_runs_on(monkeypatch):
  """A decoder without a mesh would take the CPU's forms everywhere."""
  model, meshes = tiny.experiment(model__pattern='full*2').model, []
  prefill, *_ = generate.programs.__wrapped__(model, generate.Sampling())
  tree, ints = variables(model), jnp.zeros((1, 4), jnp.int32)
  monkeypatch.setattr(sharding, 'platform_of', lambda mesh: meshes.append(mesh) or 'cpu')
  jax.eval_shape(prefill, tree, init_cache(model, 1, 256), ints, ints, ints + 1, jnp.zeros((1, model.vocab_size)))
  assert meshes and all(mesh.size == 1 and mesh.devices.flat[0] == jax.devices()[0] for mesh in meshes)
