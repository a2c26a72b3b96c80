"""RULER's long-context tasks before they are written down: facts to keep, a question, the answers (arXiv:2404.06654).

Facts are numbers, so that one problem can be written as text for any checkpoint (mmx/evals/ruler.py) or as one symbol a
token for models trained from scratch (symbols.py). A *name* is 0, 1, 2, ...; a *value* is -1, -2, -3, ... .
"""

from typing import NamedTuple

import numpy as np

TASKS = ('niah_single', 'niah_multikey', 'niah_multivalue', 'niah_multiquery', 'vt', 'cwe', 'fwe')


class Problem(NamedTuple):
  """What to write and what to ask.

  facts: int64 [n, 2], a name and what it stands for, in the order of the text; [n, 1] where a fact is a word.
  questions: int64 [q], the name (niah) or value (vt) that each is about; 0 where there is nothing to say (cwe, fwe).
  answers: int64 [q, a], all of them expected.
  """

  facts: np.ndarray
  questions: np.ndarray
  answers: np.ndarray


def generator(task: str, length: int, seed: int, index: int) -> np.random.Generator:
  """All randomness of one sample: nothing else decides it, so a sample needs no storage and can be made anywhere."""
  return np.random.Generator(np.random.PCG64([TASKS.index(task), length, seed, index]))


def recall(
    random, names: int, values: int, keys: int, values_per_key: int, questions: int, distinct: bool
) -> Problem:
  """Needles in a haystack: each of `keys` names has `values_per_key` different values, one a fact.

  names, values: how many there are to choose from. distinct: no key is asked for twice and no two keys share a value.
  """
  chosen = random.permutation(names)[:keys]
  if distinct:
    table = -1 - random.permutation(values)[: keys * values_per_key].reshape(keys, values_per_key)
  else:
    table = -1 - np.argsort(random.random((keys, values)), axis=1)[:, :values_per_key]
  facts = np.stack([np.repeat(chosen, values_per_key), table.ravel()], axis=1)[random.permutation(table.size)]
  asked = random.permutation(keys)[:questions] if distinct else random.integers(0, keys, questions)
  return Problem(facts, chosen[asked], table[asked])


def trace(random, names: int, values: int, chains: int, hops: int) -> Problem:
  """Variable tracking: a chain is a name with a value, then `hops` names, each set to the one before; chains mingle.

  One question a chain: which names hold its value?
  """
  links = hops + 1
  name_CL = random.permutation(names)[: chains * links].reshape(chains, links)
  value_C = -1 - (random.permutation(values) if chains <= values else random.integers(0, values, chains))[:chains]
  stands_for_CL = np.concatenate([value_C[:, None], name_CL[:, :-1]], axis=1)
  # Sorting each chain's random moments keeps its own order and mingles it with the others.
  order = np.argsort(np.sort(random.random((chains, links)), axis=1), axis=None)
  facts = np.stack([name_CL.ravel()[order], stands_for_CL.ravel()[order]], axis=1)
  return Problem(facts, value_C, name_CL)


def common_words(random, names: int, words: int, common: int, often: int, seldom: int) -> Problem:
  """`common` words come `often` times, the rest `seldom` times, shuffled: which are the common ones?

  In a short text the common words fill half of it, and come twice as often as the rest at least.
  """
  often = max(min(often, words // (2 * common)), 2)
  seldom = min(seldom, often // 2)
  rare = min(-(-(words - common * often) // seldom), names - common)
  chosen = random.permutation(names)[: common + rare]
  text = np.concatenate([np.repeat(chosen[:common], often), np.repeat(chosen[common:], seldom)])[:words]
  return Problem(random.permutation(text)[:, None], np.zeros(1, int), chosen[None, :common])


def frequent_words(random, names: int, words: int, asked: int, exponent: float = 2.0) -> Problem:
  """The word of rank r comes in proportion to r^-exponent (Zipf): which `asked` words are the most frequent?"""
  share = np.arange(1, names + 1) ** -exponent
  counts = np.maximum(np.floor(words * share / share.sum()), 1).astype(int)
  counts[:asked] += np.arange(asked, 0, -1)  # no ties among those asked for, however short the text
  chosen = random.permutation(names)
  text = np.repeat(chosen, counts)[:words]
  return Problem(random.permutation(text)[:, None], np.zeros(1, int), chosen[None, :asked])
