"""Hugging Face checkpoints in and out.

  python -m mmx.convert import HF_DIR CKPT_DIR --set mesh.fsdp=8
  python -m mmx.convert export CKPT_DIR HF_DIR --dtype bfloat16 --max_shard_size 5GB
  python -m mmx.convert verify HF_DIR --reference logits.npz --tolerance 2e-5

HF_DIR holds config.json and safetensors of MiniMax-Text-01, M1, M2 (to M2.7) or M3; CKPT_DIR is a run folder, such as
mmx.train writes, for `train.init_from`, mmx.generate and mmx.evals. `verify` compares logits and fails above the
tolerance; it takes either kind of folder.
"""

import argparse
import math
import pathlib
import re
import sys

from mmx import config
from mmx.command import errors_in_one_line, parser

UNITS = {'': 1, 'KB': 1e3, 'MB': 1e6, 'GB': 1e9}


def parse(argv: list[str]) -> argparse.Namespace:
  """Options of the command line."""
  options = parser('mmx.convert', __doc__)
  commands = options.add_subparsers(dest='command', required=True, metavar='import | export | verify')
  command = commands.add_parser('import', help='a Hugging Face folder into a run folder')
  command.add_argument('source', metavar='HF_DIR', type=pathlib.Path)
  command.add_argument('target', metavar='CKPT_DIR', type=pathlib.Path)
  _add_set(command)
  command = commands.add_parser('export', help='a run folder into a Hugging Face folder')
  command.add_argument('source', metavar='CKPT_DIR', type=pathlib.Path)
  command.add_argument('target', metavar='HF_DIR', type=pathlib.Path)
  command.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help='of the weights')
  command.add_argument('--max_shard_size', type=_bytes, default='5GB', help='of one file, such as 500MB or 5GB')
  command = commands.add_parser('verify', help='logits against a reference')
  command.add_argument('source', metavar='DIR', type=pathlib.Path)
  command.add_argument('--reference', required=True, type=pathlib.Path, help='.npz: tokens [B, T], logits [B, T, V]')
  command.add_argument('--tolerance', type=float, default=2e-5, help='on the difference over the largest logit')
  _add_set(command)
  return options.parse_args(argv)


def main(argv: list[str]) -> int:
  """0, or 1 for a difference above the tolerance; whatever a person can mend ends in one line and 1."""
  options = parse(argv)
  with errors_in_one_line():
    return run(options)


def run(options: argparse.Namespace) -> int:
  """One command."""
  if options.command == 'export':
    from mmx.convert.exporter import export_checkpoint

    export_checkpoint(options.source, options.target, options.dtype, options.max_shard_size)
    return 0
  overrides = dict(map(config.parse_assignment, options.set))
  if options.command == 'import':
    from mmx.convert.importer import import_checkpoint

    import_checkpoint(options.source, options.target, overrides)
    return 0
  from mmx.convert.verify import verify

  found = verify(options.source, options.reference, overrides)
  within = found.relative <= options.tolerance
  print(f'{found}: {"within" if within else "above"} the tolerance of {options.tolerance:g}')
  return 0 if within else 1  # a NaN is above


def _add_set(command):
  command.add_argument('--set', action='append', default=[], metavar='FIELD=VALUE', help='override one field')


def _bytes(text: str) -> int:
  match = re.fullmatch(r'(\d+(?:\.\d+)?)\s*(KB|MB|GB|)', text, re.IGNORECASE)
  if not match or not (size := math.floor(float(match[1]) * UNITS[match[2].upper()])):
    raise argparse.ArgumentTypeError(f'{text!r} is no size, such as 500MB or 5GB')
  return size


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
