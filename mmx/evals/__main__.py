"""Judges a checkpoint: RULER's tasks at any length, in text or, if it was trained on them, in symbols.

  python -m mmx.evals --checkpoint=runs/moe_ablation_cpu/e128_top8/seed0 --tasks=ruler --lengths=1k,4k
  python -m mmx.evals --checkpoint=runs/attention_ablation_cpu/full/seed0 --tasks=vt --lengths=128,256,512

Prints task x length with 95% intervals over samples and writes the same as JSON, by default into the run's folder.
"""

import json
import pathlib
import re
import time

from mmx.command import errors_in_one_line, parser
from mmx.config import ConfigError


def parse(argv):
  options = parser('mmx.evals', __doc__)
  options.add_argument('--checkpoint', required=True, help='folder of a run, or of an imported checkpoint')
  options.add_argument('--tasks', default='ruler', help='ruler, which is all of its tasks, or some by name: vt,cwe')
  options.add_argument('--lengths', default='1k,4k', help='in tokens, answers included; 4k is 4096')
  options.add_argument('--samples', type=int, default=32, help='questions (in symbols: documents) of a task and length')
  options.add_argument('--batch', type=int, default=8, help='questions answered together')
  options.add_argument('--seed', type=int, default=0, help='of the samples')
  options.add_argument('--json', help='where to write the scores; ruler.json in the checkpoint folder if left out')
  return options.parse_args(argv)


def main(argv=None) -> None:
  options = parse(argv)
  with errors_in_one_line():
    judge(options)


def judge(options) -> None:
  """What the options ask for."""
  tasks, lengths = chosen_tasks(options.tasks), [tokens(length) for length in options.lengths.split(',')]
  for name in ('samples', 'batch'):
    if getattr(options, name) < 1:
      raise ConfigError(f'--{name}={getattr(options, name)}: must be positive')

  from mmx import generate, sharding
  from mmx.config import MeshConfig
  from mmx.evals import run
  from mmx.evals.report import Table
  from mmx.report import Result, nan_to_none

  began = time.time()
  experiment, vocabulary, variables = generate.load(options.checkpoint)
  if experiment.data.tokenizer == 'symbols':
    mesh = sharding.build_mesh(MeshConfig(num_devices=1))
    scores = run.answer_symbols(
        experiment.model, variables['params'], variables.get('router', {}), mesh, tasks, lengths, options.samples,
        options.batch * min(lengths), options.seed,
    )
  else:
    scores = run.answer_text(
        experiment.model, variables, vocabulary, tasks, lengths, options.samples, options.batch, options.seed
    )
  folder = pathlib.Path(options.checkpoint)
  written = pathlib.Path(options.json or folder / 'ruler.json')
  told = {'checkpoint': str(folder), 'seed': options.seed, 'wall_seconds': time.time() - began, 'ruler': scores}
  written.write_text(json.dumps(nan_to_none(told), indent=1, allow_nan=False) + '\n')
  print(Table([Result('score', 0, {'ruler': scores})]).to_terminal())
  print(f'{written} has these scores; ± is the 95% interval over {options.samples} samples')


def chosen_tasks(text: str) -> list[str]:
  """'ruler' is all; raises ConfigError for a task that there is not."""
  from mmx.evals.ruler import TASKS

  names = [name for word in text.split(',') for name in (TASKS if word == 'ruler' else [word])]
  for name in names:
    if name not in TASKS:
      raise ConfigError(f'--tasks: unknown task {name!r}; ruler, or some of {", ".join(TASKS)}')
  return list(dict.fromkeys(names))


def tokens(text: str) -> int:
  """'4k' -> 4096, '1M' -> 1048576, '500' -> 500; raises ConfigError."""
  match = re.fullmatch(r'([1-9]\d*)([kKmM]?)', text)
  if not match:
    raise ConfigError(f'--lengths: {text!r} is not a length; write 4k, 4096 or 1M')
  return int(match[1]) * {'': 1, 'k': 1024, 'm': 1024**2}[match[2].lower()]


if __name__ == '__main__':
  main()
