"""A run folder into a Hugging Face folder, a tensor at a time."""

import json
import pathlib
from collections.abc import Callable

import ml_dtypes
import numpy as np

from mmx import config
from mmx.checkpoint_params import Parameters
from mmx.config import ConfigError
from mmx.convert import families, safetensors_io
from mmx.convert.family import read_json
from mmx.convert.importer import BESIDE, copy_beside
from mmx.convert.mapping import tensors

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
KEPT = (  # fields of the imported config.json that our config has no place for
    'bos_token_id', 'eos_token_id', 'pad_token_id', 'max_position_embeddings', 'initializer_range',
)


def export_checkpoint(
    run: pathlib.Path, folder: pathlib.Path, dtype: str = 'float32', max_shard_bytes: int = 5_000_000_000,
    say: Callable[[str], None] = print,
) -> None:
  """Writes config.json, sharded safetensors and the tokenizer's files of the newest whole checkpoint of a run folder.

  dtype: of the weights; router gates and expert biases are float32 always, as in the released files.

  Raises:
    ConfigError: the model is none of the families, or the folder holds weights already. CheckpointError: no checkpoint.
  """
  experiment = config.load(run / 'config.gin')
  model = experiment.model
  family = families.of_model(model)
  if list(folder.glob('*.safetensors')):
    raise ConfigError(f'{folder} holds weights already; give another folder')
  saved = Parameters(run)
  shapes = {name: tuple(leaf['shape']) for name, leaf in saved.leaves.items()}
  chosen = list(tensors(model, family.namings[0], shapes))
  covered = {leaf for tensor in chosen for leaf in tensor.leaves}
  dropped = [name for name in shapes if name not in covered]
  modules = [name for name in dropped if '/mtp_' in name]
  for name in dropped:
    if name not in modules and (name.startswith('params/') or np.any(saved.open(name).read().result())):
      raise ConfigError(f'{saved.path}: {family.name} has nothing that could hold {name}')
  if modules:
    say(f'left behind: {len(modules)} parameters of MTP modules, which no released format has')

  opened = {}

  def values():
    for tensor in chosen:
      parts = []
      for leaf in tensor.leaves:
        if leaf not in opened:
          opened[leaf] = saved.open(leaf)
        parts.append(opened[leaf][tensor.at].read().result())
      yield tensor.from_ours(parts)

  exact = ('.gate.weight', '.e_score_correction_bias')
  dtypes = {tensor.name: DTYPES['float32' if tensor.name.endswith(exact) else dtype] for tensor in chosen}
  folder.mkdir(parents=True, exist_ok=True)
  # A run that started from an import names the tokenizer there, and what else was copied lies beside it.
  imported = (run / 'config.json').exists() or experiment.data.tokenizer == 'byte'
  beside = run if imported else pathlib.Path(experiment.data.tokenizer).parent
  copy_beside(beside, folder, [pattern for pattern in BESIDE if pattern != 'config.json'])
  before = read_json(beside / 'config.json') if (beside / 'config.json').exists() else {}
  kept = {'bos_token_id': None, 'eos_token_id': None} | before | before.get('text_config', {})
  fields = {name: kept[name] for name in KEPT if name in kept} | family.write(model) | {'dtype': dtype}
  (folder / 'config.json').write_text(json.dumps(fields, indent=2, sort_keys=True) + '\n')
  files = safetensors_io.write(
      folder, {tensor.name: tensor.shape for tensor in chosen}, dtypes, values(), max_shard_bytes)
  say(f'{family.name}: {len(chosen):,} tensors of step {saved.step} in {len(files)} file(s) -> {folder}')
