"""How commands end."""

import pytest

from mmx.checkpoint import CheckpointError
from mmx.command import errors_in_one_line
from mmx.config import ConfigError
from mmx.kernels_pallas.api import UnsupportedError


@pytest.mark.parametrize('kind', [ConfigError, CheckpointError, UnsupportedError, FileNotFoundError])
def test_what_a_person_can_mend_ends_in_one_line(kind):
  with pytest.raises(SystemExit) as stopped, errors_in_one_line():
    raise kind('train.steps: 0 is not positive')
  assert stopped.value.code == 'error: train.steps: 0 is not positive'


@pytest.mark.parametrize('kind', [ValueError, RuntimeError, KeyError])
def test_a_defect_keeps_its_traceback(kind):
  with pytest.raises(kind), errors_in_one_line():
    raise kind('of a library')
