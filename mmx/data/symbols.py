"""RULER's tasks with one symbol a token, for small models trained from scratch; and the curriculum they learn by.

A document brings its own targets: answers are asked for at marked positions and never fed back, so one forward pass
answers every question of a document, and short documents pack into rows of any length.

  niah_*  noise with `name value` pairs in it, then the asked names; at each, its value (of several, one a repeat)
  vt      noise with `name value` and `name name` pairs; at the second of each, the value at the root of its chain
  cwe fwe words; in the second half every eighth symbol asks, and the answers take turns
"""

import functools
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mmx.config import ConfigError
from mmx.data import problems

PADDING, QUESTION, START = 0, 17, 18
NOISE = range(1, 17)
VALUES = range(32, 64)
NAMES = range(64, 256)
VOCAB_SIZE = 256
NO_TARGET = -1
ASK_EVERY = 8  # symbols, in the second half of a text of words
NUM_DOCUMENTS = 1 << 40
TRAIN, HELDOUT, EVAL = 0, 1 << 32, 1 << 33  # added to a seed below 2**32: no side ever sees a sample of another


class Document(NamedTuple):
  """One problem in symbols: int32 tokens and targets [n], NO_TARGET where nothing is asked.

  For scoring, int32: where the last symbol of each question stands [q], its answers [q, a], and its hops [q] (links
  between it and the answer: 1 but in vt).
  """

  tokens: np.ndarray
  targets: np.ndarray
  places: np.ndarray
  answers: np.ndarray
  hops: np.ndarray


def document(task: str, length: int, seed: int, index: int, hops: int = 3) -> Document:
  """The sample `index` of a task in exactly `length` symbols; `hops` of a vt chain. Longer texts hold more facts, up
  to the number of names (from 1,536 symbols in niah, 864 in vt), and more noise beyond."""
  random = problems.generator(task, length, seed, index)
  tokens = random.integers(NOISE.start, NOISE.stop, length)
  tokens[0] = START
  if task in ('cwe', 'fwe'):
    return write_words(task, tokens, random)
  if task == 'vt':
    chains = max(min(2 * length // 9, len(NAMES)) // (hops + 1), 1)
    return write_chains(problems.trace(random, len(NAMES), len(VALUES), chains, hops), tokens, random)
  per_key = 4 if task == 'niah_multivalue' else 1
  keys = 1 if task == 'niah_single' else max(min(length // 8, len(NAMES)) // per_key, 1)
  questions = max(length // 4 // per_key, 1) if task in ('niah_multiquery', 'niah_multivalue') else 1
  problem = problems.recall(random, len(NAMES), len(VALUES), keys, per_key, questions, distinct=False)
  return write_needles(problem, tokens, random)


def symbols_of(facts):
  """Names and values as symbols."""
  return np.where(facts >= 0, NAMES.start + facts, VALUES.start - 1 - facts)


def scatter(facts, tokens, random, end):
  """Writes the pairs [n, 2] in order, at random odd places before `end`; returns the places of their first symbols."""
  places = np.sort(random.permutation((end - 1) // 2)[: len(facts)]) * 2 + 1
  tokens[places], tokens[places + 1] = symbols_of(facts).T
  return places


def write_needles(problem, tokens, random) -> Document:
  questions, repeats = problem.answers.shape
  asked = len(tokens) - questions * repeats
  scatter(problem.facts, tokens, random, end=asked)
  tokens[asked:] = np.repeat(symbols_of(problem.questions), repeats)
  answers = symbols_of(problem.answers)
  targets = np.full(len(tokens), NO_TARGET)
  targets[asked:] = answers.ravel()  # the facts are shuffled, so this order is none that could be learned
  return finished(tokens, targets, np.arange(asked + repeats - 1, len(tokens), repeats), answers)


def write_chains(problem, tokens, random) -> Document:
  places = scatter(problem.facts, tokens, random, end=len(tokens)) + 1
  root, hops = {}, {}
  for name, stands_for in problem.facts.tolist():
    root[name], hops[name] = (stands_for, 0) if stands_for < 0 else (root[stands_for], hops[stands_for] + 1)
  value_N, hops_N = np.array([(root[name], hops[name]) for name in problem.facts[:, 0].tolist()]).T
  asked = hops_N > 0
  targets = np.full(len(tokens), NO_TARGET)
  targets[places[asked]] = symbols_of(value_N[asked])
  return finished(tokens, targets, places[asked], symbols_of(value_N[asked])[:, None], hops_N[asked])


def write_words(task, tokens, random) -> Document:
  """Words in random order, and from the middle on a question mark every few symbols that asks for the most common."""
  length = len(tokens)
  marks = np.append(np.arange(length // 2, length - 1, ASK_EVERY), length - 1)
  words = length - 1 - len(marks)
  if task == 'cwe':
    problem = problems.common_words(random, len(NAMES), words, common=4, often=12, seldom=2)
  else:
    problem = problems.frequent_words(random, len(NAMES), words, asked=3)
  targets = np.full(length, NO_TARGET)
  tokens[marks] = QUESTION
  between = np.setdiff1d(np.arange(1, length), marks)
  tokens[np.sort(random.permutation(between)[: len(problem.facts)])] = symbols_of(problem.facts[:, 0])
  answers = symbols_of(problem.answers)
  targets[marks] = np.resize(random.permutation(answers[0]), len(marks))
  return finished(tokens, targets, marks[-1:], answers)


def finished(tokens, targets, places, answers, hops=None) -> Document:
  hops = np.ones(len(places)) if hops is None else hops
  return Document(*(np.asarray(field, np.int32) for field in (tokens, targets, places, answers, hops)))


# --- curriculum -------------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
  length: int  # symbols of a document
  hops: int  # of a vt chain
  documents: int  # how many, before the next stage


@dataclass(frozen=True)
class Lessons:
  """What `ruler:TASK+TASK:STAGES` names: a stream of documents that grow longer and harder by their index alone.

  Tasks take turns, document by document; one written twice comes twice as often. A stage is LENGTH[/HOPS]*TOKENS, with
  k or M for thousands or millions of tokens, and the last, which has no *TOKENS, goes on for ever: a schedule in place
  of a rule that watches the loss, so that the arms of an ablation see equal documents and a stopped run continues.
  """

  tasks: tuple[str, ...]
  stages: tuple[Stage, ...]

  @classmethod
  def parse(cls, text: str) -> 'Lessons':
    """'vt+niah_multiquery:32/1*100k,128/3'; raises ConfigError."""
    fail = lambda what: ConfigError(f'data.source: ruler:{text}: {what}')
    names, _, schedule = text.partition(':')
    tasks = tuple(names.split('+'))
    for task in tasks:
      if task not in problems.TASKS:
        raise fail(f'unknown task {task!r}; one of {", ".join(problems.TASKS)}')
    stages, items = [], schedule.split(',')
    for number, item in enumerate(items, start=1):
      match = re.fullmatch(r'(\d+)(?:/(\d+))?(?:\*(\d+)([kM]?))?', item)
      if not match:
        raise fail(f'stage {item!r} is not LENGTH[/HOPS][*TOKENS], such as 64/2*100k')
      length, hops, tokens, unit = match.groups()
      if (tokens is None) != (number == len(items)):
        raise fail(f'stage {item!r}: every stage but the last needs *TOKENS, and the last goes on for ever')
      length, hops = int(length), int(hops or 3)
      if length < 16 or not 1 <= hops <= length // 8:
        raise fail(f'stage {item!r}: at least 16 symbols, and from 1 to LENGTH/8 hops')
      tokens = int(tokens or 0) * {'': 1, 'k': 1000, 'M': 1_000_000}[unit or '']
      stages.append(Stage(length, hops, tokens // length))
    return cls(tasks, (*stages[:-1], stages[-1]._replace(documents=NUM_DOCUMENTS)))

  @functools.cached_property
  def ends(self) -> np.ndarray:
    """Documents up to and with each stage."""
    return np.cumsum([stage.documents for stage in self.stages])

  def __len__(self) -> int:
    return NUM_DOCUMENTS

  def document(self, seed: int, index: int) -> Document:
    """Document `index` of the stream of a seed."""
    return self.at(int(np.searchsorted(self.ends, index, side='right')), seed, index)

  def final(self, seed: int, index: int) -> Document:
    """One of the last stage, whatever its index."""
    return self.at(len(self.stages) - 1, seed, index)

  def at(self, stage: int, seed: int, index: int) -> Document:
    length, hops, _ = self.stages[stage]
    return document(self.tasks[index % len(self.tasks)], length, seed, index, hops)
