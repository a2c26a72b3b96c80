"""RULER in text: as long as asked, answerable from the text, the same everywhere, scored as RULER scores."""

import re

import pytest

from mmx.config import ConfigError
from mmx.data import tokenizer
from mmx.evals import ruler

BYTES = tokenizer.load('byte')


def answered(task, prompt):
  """The answers, found by reading the prompt as a person would."""
  text, _, question = prompt.rpartition('\n\nQuestion: ')
  if task == 'vt':
    value = re.search(r'hold (\d+)\?', question)[1]
    held = {}
    for name, content in re.findall(r'VAR (\w+) = (?:VAR )?(\w+)', text):
      held[name] = held.get(content, content)
    return {name for name, content in held.items() if content == value}
  if task in ('cwe', 'fwe'):
    words = re.findall(r'[a-z]{6}', text.partition('\n\n')[2])
    counts = {word: words.count(word) for word in words}
    return set(sorted(counts, key=counts.get)[-(10 if task == 'cwe' else 3) :])
  names = re.search(r'about (.*)\?', question)[1].split(', ')
  return {value for name, value in re.findall(r'The number for (\w+) is (\d+)\.', text) if name in names}


@pytest.mark.parametrize('length', [1024, 5000])
@pytest.mark.parametrize('task', ruler.TASKS)
def test_answers_follow_from_the_prompt(task, length):
  for index in range(4):
    sample = ruler.sample(task, length, 0, index, BYTES)
    assert answered(task, sample.prompt) == set(sample.answers)
    assert len(set(sample.answers)) == {'niah_single': 1, 'niah_multikey': 1, 'vt': 5, 'cwe': 10, 'fwe': 3}.get(task, 4)
    assert sample.max_new_tokens >= len(BYTES.encode(', '.join(sample.answers)))


@pytest.mark.parametrize('task', ruler.TASKS)
def test_prompt_and_answer_fill_the_length_in_tokens_of_the_tokenizer(task):
  class ByWord(tokenizer.ByteTokenizer):
    def encode(self, text):
      return text.split()

  for vocabulary, unit in ((BYTES, 50), (ByWord(), 12)):
    for length in (1100, 20_000):
      sample = ruler.sample(task, length, 1, 0, vocabulary)
      used = len(vocabulary.encode(sample.prompt)) + sample.max_new_tokens
      assert length - 3 * unit <= used <= length


def test_sample_is_a_function_of_task_length_seed_and_index():
  same = ruler.sample('niah_multikey', 1024, 0, 0, BYTES)
  assert ruler.sample('niah_multikey', 1024, 0, 0, BYTES) == same
  for other in [('niah_multikey', 1024, 0, 1), ('niah_multikey', 1024, 1, 0), ('niah_single', 1024, 0, 0)]:
    assert ruler.sample(*other, BYTES).answers != same.answers


def test_needles_lie_at_every_depth():
  depths = []
  for index in range(60):
    sample = ruler.sample('niah_single', 2048, 0, index, BYTES)
    depths.append(sample.prompt.index('The number for') / len(sample.prompt))
  assert min(depths) < 0.2 and max(depths) > 0.8


def test_score_is_the_share_of_answers_found_or_whether_any_is():
  assert ruler.score('They are ABC, and def.', ('abc', 'DEF', 'ghi', 'jkl')) == 0.5
  assert ruler.score('They are ABC.', ('abc', 'ghi'), match='part') == 1.0
  assert ruler.score('nothing', ('abc', 'ghi'), match='part') == ruler.score('nothing', ('abc',)) == 0.0


@pytest.mark.parametrize('task, length, message', [
    ('vtt', 1024, "unknown task 'vtt'; one of niah_single"),
    ('vt', 64, 'vt in 64 tokens: the question alone takes'),
])
def test_mistakes_end_in_one_line(task, length, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    ruler.sample(task, length, 0, 0, BYTES)
