"""Memory and communication of large steps stay within what they were: UPDATE_GOLDEN=1 writes what they are now.

Whole widths, slices and meshes, few layers: what a layer costs is seen in two of them.
"""

import json
import os
import pathlib

import pytest

from mmx import config, proof

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'aot'
EXPERIMENTS = pathlib.Path(__file__).parents[2] / 'experiments'
SLACK = 1.02


def m2(arm):
  file = config.load_experiment(EXPERIMENTS / 'm2_pretrain.py', 'v5p_64')
  return config.override(config.select_arm(file, arm), {'model.pattern': 'full*2'})


def m3():
  return config.override(config.load('configs/models/m3_428b.gin'), {
      'model.pattern': 'full/dense msa*2', 'data.seq_len': 8192, 'data.batch_size': 32, 'mesh.fsdp': 1,
      'mesh.expert': 16, 'mesh.context': 4, 'model.moe.transport': 'direct', 'model.moe.capacity_factor': 1.5,
      'train.loss_chunk': 65536,
  })


@pytest.mark.parametrize('name, experiment', [('m2_8k_two_layers', lambda: m2('8k')), ('m3_three_layers', m3)])
def test_a_step_needs_no_more_memory_and_sends_no_more_than_before(name, experiment):
  found = proof.prove(experiment(), 'v5p:4x4x4')
  sent = {f'{c.kind} in groups of {c.group}': {'count': c.count, 'bytes': round(c.bytes)} for c in found.collectives}
  now = {'peak': found.peak, 'temporaries': found.temporaries, 'collectives': dict(sorted(sent.items()))}
  file = GOLDEN / f'{name}.json'
  if os.environ.get('UPDATE_GOLDEN'):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(now, indent=1) + '\n')
  before = json.loads(file.read_text())
  assert now['peak'] <= SLACK * before['peak'] and now['temporaries'] <= SLACK * before['temporaries']
  assert set(sent) <= set(before['collectives'])
  for kind, each in sent.items():
    assert each['bytes'] <= SLACK * before['collectives'][kind]['bytes'], kind
    assert each['count'] <= SLACK * before['collectives'][kind]['count'], kind
