"""Scores are those of a slow count, the same on any mesh, and a run is judged on what it was taught."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn

import tiny

from mmx import config, generate, sharding
from mmx.data import symbols, tokenizer
from mmx.evals import ruler, run
from mmx.model import Decoder, init_variables

EXPERIMENT = tiny.experiment(
    model__vocab_size=symbols.VOCAB_SIZE, model__pattern='full/dense',
    data__source='ruler:niah_multivalue+vt:16/1*1k,32', data__tokenizer='symbols',
    data__packing='first_fit', data__seq_len=32, data__batch_size=8,
)


def initialised(model):
  return nn.unbox(jax.jit(lambda: init_variables(model, None, jax.random.key(0)))())


@functools.cache
def variables():
  """Random, but of values alone: chance is then one in eight for a question with four answers."""
  tree = initialised(EXPERIMENT.model)
  tree['params']['embedding']['head'] *= jnp.isin(jnp.arange(symbols.VOCAB_SIZE), jnp.array(symbols.VALUES))[None]
  return tree


def mesh_of(devices):
  return sharding.build_mesh(config.MeshConfig(num_devices=devices))


def scores(devices=1, samples=12, tokens_at_once=128, seed=0):
  tree = variables()
  return run.answer_symbols(
      EXPERIMENT.model, tree['params'], tree.get('router', {}), mesh_of(devices), ['niah_multivalue', 'vt'], [32, 48],
      samples, tokens_at_once, seed,
  )


def slow_score(task, length, samples):
  """One document at a time, one question at a time, from all logits; and the interval by scipy."""
  shares, apply = [], jax.jit(Decoder(EXPERIMENT.model).apply)
  for index in range(samples):
    document = symbols.document(task, length, symbols.EVAL, index)
    tokens = jnp.asarray(document.tokens)[None]
    out = apply(variables(), tokens, jnp.arange(length)[None], jnp.ones_like(tokens))
    logits = np.asarray(out.hidden[0] @ out.head)
    found = []
    for place, answers in zip(document.places, document.answers, strict=True):
      likeliest = np.argsort(-logits[place])[: len(answers)]
      found.append(np.mean([answer in likeliest for answer in answers]))
    shares.append(np.mean(found))
  interval = scipy.stats.t.interval(0.95, samples - 1, np.mean(shares), scipy.stats.sem(shares))
  return np.mean(shares), (interval[1] - interval[0]) / 2


def test_scores_are_those_of_a_slow_count():
  found = scores()
  for task in ('niah_multivalue', 'vt'):
    for length in (32, 48):
      score, half_width = slow_score(task, length, 12)
      cell = found[task][str(length)]
      assert score > 0 and cell['samples'] == 12
      np.testing.assert_allclose([cell['score'], cell['half_width']], [score, half_width], rtol=1e-6)
  by_hops = found['vt']['48']['by_hops']
  assert list(by_hops) == ['1', '2', '3']
  assert np.mean(list(by_hops.values())) == pytest.approx(found['vt']['48']['score'])  # as many questions of each


def test_scores_do_not_depend_on_devices_or_batches():
  assert scores(devices=8) == scores(tokens_at_once=5000) == scores()
  assert scores(seed=1) != scores()


def test_a_run_is_judged_on_its_tasks_as_long_as_it_was_taught_and_beyond():
  tree = variables()
  found = run.evaluate(EXPERIMENT, tree['params'], tree.get('router', {}), mesh_of(1), samples=4)
  assert {task: list(cells) for task, cells in found.items()} == {
      'niah_multivalue': ['32', '64', '128'], 'vt': ['32', '64', '128'],
  }
  other = config.override(EXPERIMENT, {'data.source': 'stdlib', 'data.tokenizer': 'byte'})
  assert run.evaluate(other, tree['params'], tree.get('router', {}), mesh_of(1)) == {}


def test_single_sample_has_no_interval():
  cell = run.interval(np.array([0.5]))
  assert cell['score'] == 0.5 and np.isnan(cell['half_width'])


def test_text_is_scored_by_what_the_model_writes_within_its_allowance(monkeypatch):
  vocabulary = tokenizer.load('byte')
  samples = [ruler.sample('niah_multivalue', 600, 0, index, vocabulary) for index in range(3)]
  written = {
      samples[0].prompt: f' {", ".join(samples[0].answers)}.',  # all of them
      samples[1].prompt: f' {samples[1].answers[2]}',  # one of four
      samples[2].prompt: 'x' * samples[2].max_new_tokens + samples[2].answers[0],  # too late
  }

  def stub(model, variables, prompts, max_new_tokens, sampling, eos_id):
    rows = np.full((len(prompts), max_new_tokens + 100), eos_id, np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
      ids = vocabulary.encode(written[vocabulary.decode(prompt)])
      row[: len(ids)] = ids
    yield from rows.T

  monkeypatch.setattr(generate, 'generate', stub)
  found = run.answer_text(None, None, vocabulary, ['niah_multivalue'], [600], samples=3, batch_size=2)
  cell = found['niah_multivalue']['600']
  assert cell['samples'] == 3 and cell['score'] == pytest.approx((1 + 0.25 + 0) / 3)
