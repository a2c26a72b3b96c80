"""RULER's tasks put to a model, and its scores with 95% intervals.

A score is RULER's: the share of the expected answers found, averaged over the questions of a document and then over
documents, which are the independent samples of an interval.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx import distributed, generate, sharding
from mmx.config import Experiment, ModelConfig
from mmx.data import mixture, sources, symbols
from mmx.data.tokenizer import Tokenizer
from mmx.evals import ruler
from mmx.model import Decoder
from mmx.report import t_half_width

ROWS = (1, 2, 4)  # lengths at which a run is judged, in rows of its training
SAMPLES = 128  # documents of a task and length


def evaluate(experiment: Experiment, params, router, mesh: Mesh, samples: int = SAMPLES) -> dict:
  """What a run taught by a `ruler:` source ends with: scores in its own tasks, as long as it was taught and beyond.

  Returns:
    {task: {'128': {'score': ..., 'half_width': ..., 'samples': ...}, '256': ..., '512': ...}}; {} for other sources.
  """
  items = [part.item for part in mixture.parse(experiment.data.source)]
  lessons = [sources.open(item).lessons for item in items if item.startswith('ruler:')]
  tasks = list(dict.fromkeys(task for lesson in lessons for task in lesson.tasks))
  if not tasks:
    return {}
  lengths = [rows * experiment.data.seq_len for rows in ROWS]
  at_once = experiment.data.batch_size * experiment.data.seq_len
  return answer_symbols(experiment.model, params, router, mesh, tasks, lengths, samples, at_once)


def answer_symbols(
    model: ModelConfig, params, router, mesh: Mesh, tasks: Sequence[str], lengths: Sequence[int],
    samples: int = SAMPLES, tokens_at_once: int = 8192, seed: int = 0,
) -> dict:
  """Scores of a model that was trained on symbols: one forward pass answers all questions of a document.

  A question with a answers counts the share of them among the a symbols that the model holds for the likeliest.
  `seed` chooses the documents; none of them is in any training stream.
  """
  scores = {task: {} for task in tasks}
  for length in lengths:
    documents = {
        task: [symbols.document(task, length, symbols.EVAL + seed, index) for index in range(samples)] for task in tasks
    }
    everything = [document for task in tasks for document in documents[task]]
    found_NQA = _likeliest(model, params, router, mesh, everything, tokens_at_once)
    for number, task in enumerate(tasks):
      answers_SQA = np.stack([document.answers for document in documents[task]])
      _, questions, most = answers_SQA.shape
      mine_SQA = found_NQA[number * samples : (number + 1) * samples, :questions, :most]
      score_SQ = (answers_SQA[..., :, None] == mine_SQA[..., None, :]).any(axis=-1).mean(axis=-1)
      scores[task][str(length)] = cell = interval(score_SQ.mean(axis=1))
      hops_SQ = np.stack([document.hops for document in documents[task]])
      if hops_SQ.max() > 1:
        cell['by_hops'] = {str(hops): float(score_SQ[hops_SQ == hops].mean()) for hops in np.unique(hops_SQ)}
  return scores


def answer_text(
    model: ModelConfig, variables, vocabulary: Tokenizer, tasks: Sequence[str], lengths: Sequence[int],
    samples: int = 32, batch_size: int = 8, seed: int = 0,
) -> dict:
  """Scores of any model of text, by greedy generation and string match; the same form as `answer_symbols`."""
  scores = {task: {} for task in tasks}
  for task in tasks:
    for length in lengths:
      questions = [ruler.sample(task, length, seed, index, vocabulary) for index in range(samples)]
      found = []
      for start in range(0, samples, batch_size):
        batch = questions[start : start + batch_size]
        texts = continuations(model, variables, vocabulary, batch)
        found += [ruler.score(text, question.answers) for text, question in zip(texts, batch, strict=True)]
      scores[task][str(length)] = interval(np.array(found))
  return scores


def continuations(model: ModelConfig, variables, vocabulary: Tokenizer, batch: Sequence[ruler.Sample]) -> list[str]:
  """What the model writes behind each prompt; a document that ended earlier repeats its end."""
  prompts = [vocabulary.encode(question.prompt).tolist() for question in batch]
  most = max(question.max_new_tokens for question in batch)
  greedy = generate.Sampling(vocabulary.vocab_size)
  tokens = np.stack(list(generate.generate(model, variables, prompts, most, greedy, eos_id=vocabulary.eos_id)), axis=1)
  return [vocabulary.decode(row[: question.max_new_tokens]) for row, question in zip(tokens, batch, strict=True)]


def interval(score_S) -> dict[str, float | int]:
  """Mean of independent scores and half its 95% t-interval; NaN for a single one."""
  count = len(score_S)
  half_width = t_half_width(np.std(score_S, ddof=1), count) if count > 1 else math.nan
  return {'score': float(np.mean(score_S)), 'half_width': float(half_width), 'samples': count}


def _likeliest(model, params, router, mesh, documents, tokens_at_once):
  """The likeliest symbols at each question [N, Q, A] for documents of one length; Q and A are the most of any of them,
  so that one program serves all tasks."""
  questions = max(len(document.places) for document in documents)
  most = max(document.answers.shape[1] for document in documents)
  columns = {
      'tokens': np.stack([document.tokens for document in documents]),
      'places': np.stack([np.resize(document.places, questions) for document in documents]),
  }
  count, length = columns['tokens'].shape
  shards = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
  rows = -(-max(tokens_at_once // length, 1) // shards) * shards
  answer, found = _program(model, mesh, most), []
  for start in range(0, count, rows):
    batch = {name: column[np.arange(start, start + rows) % count] for name, column in columns.items()}
    # Fetched one by one: programs with collectives that queue on the few threads of a CPU wait for each other for ever.
    found.append(np.asarray(answer(params, router, distributed.put_whole(batch, mesh, PartitionSpec(sharding.BATCH_AXES)))))
  return np.concatenate(found)[:count]


@functools.cache
def _program(model: ModelConfig, mesh: Mesh, most: int):
  """answer(params, router, {tokens [B, T], places [B, Q]}) -> the `most` likeliest symbols there [B, Q, most]."""

  def answer(params, router, batch):
    tokens_BT = batch['tokens']
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    variables = {'params': params, 'router': router}
    out = Decoder(model, mesh).apply(variables, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
    asked_BQD = jnp.take_along_axis(out.hidden, batch['places'][..., None], axis=1)
    return jax.lax.top_k(jnp.matmul(asked_BQD.astype(jnp.float32), out.head), most)[1]

  return jax.jit(answer, out_shardings=NamedSharding(mesh, PartitionSpec()))
