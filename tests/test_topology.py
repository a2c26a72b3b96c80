"""Names of slices."""

import pytest

from mmx import topology
from mmx.config import ConfigError


def test_a_slice_has_its_chips():
  kind, chip, chips = topology.parse('v5p:4x4x8')
  assert (kind, chips, chip.memory) == ('v5p', 128, 95.74 * 2**30)


@pytest.mark.parametrize('name, said', [
    ('v7:2x2', "unknown chip 'v7'; known are v5e, v5p, v6e, h200"), ('v5p:3x3x3', 'v5p comes as 2x2x1, 2x2x2'),
    ('v5p', 'unknown shape'),
])
def test_an_unknown_slice_is_refused_with_those_that_are_known(name, said):
  with pytest.raises(ConfigError) as told:
    topology.parse(name)
  assert f'--topology={name}: ' in str(told.value) and said in str(told.value) and '\n' not in str(told.value)
