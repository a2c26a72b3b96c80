"""Sweeps are plain lists of override dicts; names are unique, short and safe as folders."""

import re

import pytest

from mmx.config import ConfigError, Experiment
from mmx.sweep import axis, chain, expand, name_of, prod, zipit

EXPERTS, TOP_K = axis('model.moe.num_experts', [32, 128]), axis('model.moe.top_k', [2, 8])


def test_prod_gives_every_combination_with_the_last_axis_fastest():
  sweep = prod(axis('a', [1, 2]), axis('b', ['x', 'y', 'z']))
  assert sweep == [{'a': a, 'b': b} for a in (1, 2) for b in 'xyz']
  assert prod() == [{}]


def test_zipit_goes_side_by_side_and_names_the_axes_of_unequal_length():
  assert zipit(EXPERTS, TOP_K) == [
      {'model.moe.num_experts': 32, 'model.moe.top_k': 2}, {'model.moe.num_experts': 128, 'model.moe.top_k': 8}
  ]
  with pytest.raises(ConfigError, match=r'model\.moe\.num_experts has 2, train\.seed has 3') as error:
    zipit(EXPERTS, axis('train.seed', [0, 1, 2]))
  assert '\n' not in str(error.value)


def test_chain_keeps_order_and_shares_nothing_with_its_parts():
  first = axis('a', [1])
  joined = chain(first, axis('b', [2]))
  assert joined == [{'a': 1}, {'b': 2}]
  joined[0]['a'] = 5
  assert first == [{'a': 1}]


def test_a_field_set_by_two_axes_is_refused():
  with pytest.raises(ConfigError, match='train.seed is set by two axes'):
    prod(axis('train.seed', [0]), axis('train.seed', [1]))
  with pytest.raises(ConfigError, match='train.seed is set by two axes'):
    zipit(axis('train.seed', [0]), axis('train.seed', [1]))


def test_names_are_short_but_keep_apart_fields_of_one_name():
  assert name_of({}) == 'base'
  assert name_of({'model.moe.num_experts': 128, 'model.moe.top_k': 8}) == 'num_experts=128+top_k=8'
  assert name_of({'train.seed': 1, 'data.seed': 2}) == 'train.seed=1+data.seed=2'
  assert name_of({'model.d_ff': 512, 'model.moe.d_ff': 64}) == 'model.d_ff=512+moe.d_ff=64'
  assert name_of({'train.seed': 1}, among=['data.seed']) == 'train.seed=1'
  assert name_of({'optim.learning_rate': 1e-5}) == 'learning_rate=1e-05'


@pytest.mark.parametrize('value', ['(lightning*7 full)*10', 'full/dense*3 full*57', '../up', True, -0.5, None])
def test_names_are_one_folder_whatever_the_value(value):
  assert re.fullmatch(r'pattern=[\w.-]+', name_of({'model.pattern': value}))


def test_expand_gives_one_experiment_per_arm_in_order():
  arms = expand(Experiment(), zipit(EXPERTS, TOP_K), name=lambda o: f"e{o['model.moe.num_experts']}")
  assert list(arms) == ['e32', 'e128']
  assert [(arm.model.moe.num_experts, arm.model.moe.top_k) for arm in arms.values()] == [(32, 2), (128, 8)]
  assert arms['e32'].optim == Experiment().optim


def test_expand_tells_apart_arms_that_set_fields_of_one_name():
  arms = expand(Experiment(), chain(axis('train.seed', [1]), axis('data.seed', [1])))
  assert list(arms) == ['train.seed=1', 'data.seed=1']


def test_an_override_that_fits_no_field_is_refused():
  with pytest.raises(ConfigError, match='top_k'):
    expand(Experiment(), axis('model.moe.top_kk', [1]))


def test_two_arms_of_one_name_and_an_empty_sweep_are_refused():
  with pytest.raises(ConfigError, match=r"two arms are named 'top_k=2': .*2.* and .*2") as error:
    expand(Experiment(), chain(TOP_K, TOP_K))
  assert '\n' not in str(error.value)
  with pytest.raises(ConfigError, match='two arms'):
    expand(Experiment(), TOP_K, name=lambda overrides: 'same')
  with pytest.raises(ConfigError, match='no arms'):
    expand(Experiment(), axis('train.seed', []))
