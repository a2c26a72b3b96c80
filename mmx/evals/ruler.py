"""RULER's tasks as text for any checkpoint, filled to the asked length, with RULER's scoring (arXiv:2404.06654).

The problems come from mmx/data/problems.py, where models in symbols learn the same ones; the sizes are those of RULER,
the words are ours, and nothing is downloaded.

  niah_single      one needle `the number for NAME is VALUE` in filler text; what is the number for NAME?
  niah_multikey    four needles, one asked for
  niah_multivalue  four needles of one name, all values asked for
  niah_multiquery  four needles, all asked for
  vt               one chain of five variables; which ones hold VALUE?
  cwe              numbered words: ten come 30 times, the others 3 times; which are the ten?
  fwe              words with Zipf's frequencies; which three come most often?
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmx.config import ConfigError
from mmx.data import problems
from mmx.data.symbols import EVAL
from mmx.data.tokenizer import Tokenizer

TASKS = problems.TASKS
SYLLABLES = [consonant + vowel for consonant in 'bdfghjklmnprstvz' for vowel in 'aeiou']
LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'
FILLER = (
    'The path follows the river to the old mill.', 'A cart with hay stands by the gate.', 'Rain fell in the morning.',
    'Two children count the boats from the bridge.', 'The baker opens at six.', 'Beyond the field a dog barks.',
    'It will be dark before the last train leaves.',
)
NEEDLES = 'Numbers for some names are hidden in the following text. Remember them: you will be asked about them.'
CHAINS = 'Variables are set in the following text, some to numbers and some to other variables. Keep track of them.'
PROBE = 64  # sentences or words, to see how many tokens one takes
LIST = 'Read the following list of words and keep in mind how often each of them comes.'


@dataclass(frozen=True)
class Sample:
  """One question to a model, which goes on where the prompt ends."""

  prompt: str
  answers: tuple[str, ...]
  max_new_tokens: int


def sample(task: str, length: int, seed: int, index: int, tokenizer: Tokenizer) -> Sample:
  """Sample `index` of a task: prompt and answer together fill `length` tokens of the tokenizer as far as they can.

  Raises:
    ConfigError: no such task, or the question alone is longer.
  """
  if task not in TASKS:
    raise ConfigError(f'unknown task {task!r}; one of {", ".join(TASKS)}')
  tokens_of = lambda text: len(tokenizer.encode(text))
  write = functools.partial(_write_words if task in ('cwe', 'fwe') else _write_facts, task)
  made = lambda size: write(size, problems.generator(task, length, EVAL + seed, index))
  room_for_answers = 2 * tokens_of(', '.join(made(0)[1])) + 8
  try:
    size = largest(lambda size: tokens_of(made(size)[0]), length - room_for_answers)
  except ValueError as error:
    raise ConfigError(f'{task} in {length} tokens: {error}, and {room_for_answers} are kept for the answer') from None
  prompt, answers = made(size)
  return Sample(prompt, answers, room_for_answers)


def largest(tokens_of: Callable[[int], int], room: int) -> int:
  """The size whose text fills `room` tokens, give or take a few units; six texts or so are measured, however long."""
  empty = tokens_of(0)
  if empty > room:
    raise ValueError(f'the question alone takes {empty}')
  size = PROBE
  for _ in range(3):  # a unit's tokens change a little with the size: the words of cwe are numbered
    per_unit = max((tokens_of(size) - empty) / size, 1.0)
    size = max(int((room - empty) / per_unit), 1)
  while (over := tokens_of(size) - room) > 0:
    size = max(size - math.ceil(over / per_unit), 0)
  return size


def _write_facts(task: str, filler: int, random) -> tuple[str, tuple[str, ...]]:
  """(prompt, answers) with that many sentences between the facts."""
  if task == 'vt':
    problem = problems.trace(random, names=5, values=1, chains=1, hops=4)
    name = [''.join(random.choice(list(LETTERS), 5)) for _ in range(5)]
    write = lambda fact: f'VAR {name[fact[0]]} = ' + (f'VAR {name[fact[1]]}' if fact[1] >= 0 else value[-1 - fact[1]])
  else:
    keys = 1 if task in ('niah_single', 'niah_multivalue') else 4
    per_key, asked = (4 if task == 'niah_multivalue' else 1), (4 if task == 'niah_multiquery' else 1)
    problem = problems.recall(random, 4, 4, keys, per_key, asked, distinct=True)
    name = words(random, 4)
    write = lambda fact: f'The number for {name[fact[0]]} is {value[-1 - fact[1]]}.'
  value = [str(number) for number in random.choice(9_000_000, 4, replace=False) + 1_000_000]

  places = np.sort(random.integers(0, filler + 1, len(problem.facts)))
  parts, written = [], 0
  for place, fact in zip(places.tolist(), problem.facts.tolist(), strict=True):
    parts += [FILLER[sentence % len(FILLER)] for sentence in range(written, place)] + [write(fact)]
    written = place
  parts += [FILLER[sentence % len(FILLER)] for sentence in range(written, filler)]
  text = ' '.join(parts) if task != 'vt' else '\n'.join(parts)

  if task == 'vt':
    question = f'which five variables hold {value[0]}?\nAnswer: the variables that hold {value[0]} are'
    return _prompt(CHAINS, text, question), tuple(name[answer] for answer in problem.answers[0].tolist())
  about = ', '.join(name[question] for question in problem.questions.tolist())
  subject = f'the number for {about} is' if problem.answers.size == 1 else f'all the numbers for {about} are'
  prompt = _prompt(NEEDLES, text, f'what is written about {about}?\nAnswer: {subject}')
  return prompt, tuple(value[-1 - answer] for answer in problem.answers.ravel().tolist())


def _write_words(task: str, size: int, random) -> tuple[str, tuple[str, ...]]:
  """(prompt, answers) with 20 words more than `size`."""
  count = size + 20
  if task == 'cwe':
    problem = problems.common_words(random, 10 + count, count, common=10, often=30, seldom=3)
    name = words(random, 10 + count)
    text = ' '.join(f'{place}. {name[word]}' for place, (word,) in enumerate(problem.facts.tolist(), start=1))
    asked, most = 'ten', 'most common'
  else:
    problem = problems.frequent_words(random, 2000, count, asked=3)
    name = words(random, 2000)
    text = ' '.join(name[word] for (word,) in problem.facts.tolist())
    asked, most = 'three', 'most frequent'
  question = f'which {asked} words are the {most} ones in the list?\nAnswer: the {asked} {most} words are'
  return _prompt(LIST, text, question), tuple(name[answer] for answer in problem.answers[0].tolist())


def _prompt(task: str, text: str, question: str) -> str:
  return f'{task}\n\n{text}\n\nQuestion: {question}'


def words(random, count: int) -> list[str]:
  """Different words of three syllables that no language has, out of 512,000."""
  numbers = random.choice(len(SYLLABLES) ** 3, count, replace=False)
  digits = np.stack(np.unravel_index(numbers, (len(SYLLABLES),) * 3), axis=1)
  return [''.join(SYLLABLES[digit] for digit in word) for word in digits.tolist()]


def score(prediction: str, answers: Sequence[str], match: Literal['all', 'part'] = 'all') -> float:
  """RULER's string match, blind to case: the share of the answers that the prediction contains ('all'), or whether it
  contains any ('part', which RULER uses where several answers say the same)."""
  found = [answer.lower() in prediction.lower() for answer in answers]
  return float(any(found)) if match == 'part' else sum(found) / len(found)
