"""What a run says while it runs: TensorBoard events, `metrics.jsonl`, the progress bar, tokens per second, memory.

A run folder is `<root>/<arm>/seed<k>`, so `tensorboard --logdir <root>` shows arms and seeds side by side. Nothing here
touches the device except `LateMetrics` and `memory_stats`, which import jax when they are called.
"""

import collections
import contextlib
import json
import logging
import math
import os
import pathlib
import re
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from etils import epath

GIB = 2.0**30  # bytes
UPLOAD_S = 60  # seconds between two copies of a growing file to object storage, which takes only whole ones


class RunWriter:
  """TensorBoard event file and `metrics.jsonl` of one run; each call is on disk when it returns.

  With a `logdir` such as gs://bucket/run it is on a disk of this machine then, and there within UPLOAD_S, or after
  `flush` and `close`.

  Written with the `tensorboard` package alone. `start_step` is the step of the checkpoint that the run continues from:
  what an earlier attempt wrote after it is cut from `metrics.jsonl` (in one atomic replace) and masked in TensorBoard
  (whose fast loader does so tag by tag, as each is written again). 0 starts afresh and masks everything. One process
  of a distributed run writes.

  Raises:
    OSError: the folder cannot be written, or the disk is full.
  """

  def __init__(self, logdir: str | os.PathLike, start_step: int = 0):
    from tensorboard.compat.proto import event_pb2, summary_pb2  # here: 0.3 s that `import mmx` need not pay
    from tensorboard.summary.writer.record_writer import RecordWriter

    self._event_pb2, self._summary_pb2 = event_pb2, summary_pb2
    self.logdir = epath.Path(logdir)
    self.logdir.mkdir(parents=True, exist_ok=True)
    _truncate_rows(self.logdir / 'metrics.jsonl', start_step)
    self._rows = _GrowingFile(self.logdir / 'metrics.jsonl')
    # TensorBoard reads the files of a folder in the order of their names: nanoseconds put this attempt after the last.
    name = f'events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}'
    self._events = _GrowingFile(self.logdir / name)
    self._records = RecordWriter(self._events)
    self._write(file_version='brain.Event:2')
    log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # events of this step and later are superseded
    self._write(step=start_step + 1 if start_step else 0, session_log=log)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """One point per tag, and one row `{"step", "time", tag: value, ...}` in `metrics.jsonl` (a NaN is written NaN)."""
    values = {tag: float(value) for tag, value in values.items()}
    points = [self._summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    self._write(step=step, summary=self._summary_pb2.Summary(value=points))
    self._rows.write(json.dumps({'step': int(step), 'time': round(time.time(), 3), **values}).encode() + b'\n')
    self._rows.flush()

  def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
    """The distribution of `values` (any shape; what is not finite is left out) in 30 buckets."""
    from tensorboard.plugins.histogram.summary_v2 import histogram_pb

    values = np.asarray(values, np.float64).ravel()
    self._write(step=step, summary=histogram_pb(tag, values[np.isfinite(values)]))

  def expert_load(self, step: int, load_LE: np.ndarray, tag: str = 'expert_load') -> None:
    """Per layer, the distribution over experts of load / mean load; `load_LE` holds tokens (or shares) per expert.

    On this axis 1 is balance, 0 an idle expert and the right tail the hot ones, whatever the number of experts. Expert
    indices as the axis would say less: TensorBoard draws 30 bins, so a hot expert among 128 would smear over four.
    """
    for layer, relative_E in enumerate(_relative_load(load_LE)):
      self.histogram(step, f'{tag}/layer_{layer:02d}', relative_E)

  def text(self, tag: str, markdown: str, step: int = 0) -> None:
    from tensorboard.plugins.text.summary_v2 import text_pb

    self._write(step=step, summary=text_pb(tag, markdown))

  def image(self, step: int, tag: str, png: bytes) -> None:
    width, height = (int.from_bytes(png[start : start + 4], 'big') for start in (16, 20))  # the IHDR chunk
    image = self._summary_pb2.Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    value = self._summary_pb2.Summary.Value(tag=tag, image=image)
    self._write(step=step, summary=self._summary_pb2.Summary(value=[value]))

  def hparams(self, hparams: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """Put the run in the HParams tab: a row named by its folder, `hparams` and the last value of each tag in `metrics`.

    `hparams` is what tells runs apart (arm, seed, the fields in which arms differ). TensorBoard takes the columns from
    whichever run it meets first, so every arm gives the same names (and draws only five at first).
    """
    from tensorboard.plugins.hparams import api_pb2, metadata, summary_v2

    plain = bool | int | float | str
    values = {name: value if isinstance(value, plain) else str(value) for name, value in hparams.items()}
    kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    columns = api_pb2.Experiment(
        time_created_secs=time.time(),
        hparam_infos=[
            api_pb2.HParamInfo(name=name, type=kinds.get(type(value), api_pb2.DATA_TYPE_FLOAT64), differs=True)
            for name, value in values.items()
        ],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics],
    )
    self._hparams_event(metadata.EXPERIMENT_TAG, experiment=columns)
    self._write(step=0, summary=summary_v2.hparams_pb(values, trial_id='/'.join(self.logdir.absolute().parts[-2:])))

  def finish(self, succeeded: bool = True) -> None:
    """Mark the run as ended in the HParams tab and close; a run that will be resumed is closed, not finished."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    status = api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    self._hparams_event(metadata.SESSION_END_INFO_TAG, session_end_info=end)
    self.close()

  def flush(self) -> None:
    """Wait until all is on the medium, for a machine about to be taken away."""
    self._events.sync()
    self._rows.sync()

  def close(self) -> None:
    self._events.close()
    self._rows.close()

  def _hparams_event(self, tag: str, **content: Any) -> None:
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2  # its `summary` would import tensorflow

    about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
    value = self._summary_pb2.Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
    self._write(step=0, summary=self._summary_pb2.Summary(value=[value]))

  def _write(self, **fields: Any) -> None:
    self._records.write(self._event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())
    self._records.flush()


class _GrowingFile:
  """Appends bytes to a file, which is there from the first of them on.

  Object storage cannot append: there the file grows on a disk here, and whole copies of it go there.
  """

  def __init__(self, path: epath.Path):
    self._path, self._file = path, None
    self._remote = '://' in os.fspath(path)
    self._uploaded, self._changed = -math.inf, False  # seconds of the monotonic clock; whether there is more since

  def write(self, content: bytes) -> None:
    if self._file is None and self._remote:
      self._file = tempfile.TemporaryFile()
      if self._path.exists():
        self._file.write(self._path.read_bytes())
    elif self._file is None:
      self._file = open(self._path, 'ab')
    self._file.write(content)
    self._changed = True

  def flush(self) -> None:
    """After a crash of this process all is there; of this machine too, where the file is on a disk that survives it."""
    if self._file is None:
      return
    self._file.flush()
    if self._remote and time.monotonic() - self._uploaded > UPLOAD_S:
      try:
        self._upload()
      except Exception as error:  # the storage's bad minute; the next copy has it all
        logging.getLogger(__name__).warning('%s is written later: %s', self._path, error)

  def sync(self) -> None:
    """All is on the medium, or an error says why not."""
    if self._file is None:
      return
    self._file.flush()
    if self._remote:
      self._upload()
    else:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    if self._file is None or self._file.closed:
      return
    self._file.flush()
    if self._remote:
      self._upload()
    self._file.close()

  def _upload(self) -> None:
    if not self._changed:
      return
    self._uploaded = time.monotonic()
    self._file.seek(0)
    self._path.write_bytes(self._file.read())
    self._changed = False


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
  """Whoever reads, writes at the same time, or comes after a crash finds one content or another, whole."""
  path = epath.Path(path)
  content = content.encode() if isinstance(content, str) else content
  if '://' in os.fspath(path):
    path.write_bytes(content)  # an object appears when it is whole
    return
  partial = path.with_name(f'{path.name}.{socket.gethostname()}.{os.getpid()}.partial')
  try:
    partial.write_bytes(content)
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


def _truncate_rows(path: epath.Path, last_step: int) -> None:
  """Keep the rows of steps 1 … last_step, or none for 0; a line cut short by a killed process goes too."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    with contextlib.suppress(json.JSONDecodeError):
      if last_step and json.loads(line)['step'] <= last_step:
        kept.append(line + '\n')
  write_whole(path, ''.join(kept))


def _relative_load(load_LE: np.ndarray) -> np.ndarray:
  """Load over the layer's mean, [L, E]; 1 where a layer got no token at all."""
  load_LE = np.atleast_2d(np.asarray(load_LE, np.float64))
  mean_L1 = load_LE.mean(axis=1, keepdims=True)
  return np.divide(load_LE, mean_L1, out=np.ones_like(load_LE), where=mean_L1 > 0)


def load_scalars(load_LE: np.ndarray) -> dict[str, float]:
  """Tags `load_max_over_mean` (worst layer), `load_max_over_mean/layer_00`, …, `idle_experts` (share of all layers)."""
  relative_LE = _relative_load(load_LE)
  worst_L = relative_LE.max(axis=1)
  per_layer = {f'load_max_over_mean/layer_{layer:02d}': float(value) for layer, value in enumerate(worst_L)}
  return {'load_max_over_mean': float(worst_L.max()), 'idle_experts': float((relative_LE == 0).mean()), **per_layer}


class LateMetrics:
  """Fetches the metrics of step n after step n+1 has been dispatched, so that the host never stalls the device.

    for step in steps:
      state, metrics = train_step(state, batch)    # returns at once
      if (late := late_metrics.push(step, metrics)) is not None:
        done_step, values = late                   # waits for the step before, while this one runs
  """

  def __init__(self):
    self._pending: tuple[int, Any] | None = None

  def push(self, step: int, device_tree: Any) -> tuple[int, Any] | None:
    """Hold the metrics of `step` and return those of the push before as (its step, the same tree of numpy arrays)."""
    import jax

    for leaf in jax.tree.leaves(device_tree):
      if hasattr(leaf, 'copy_to_host_async'):
        leaf.copy_to_host_async()  # travels as soon as it is computed; the later fetch finds it here
    late = self.drain()
    self._pending = (step, device_tree)
    return late

  def drain(self) -> tuple[int, Any] | None:
    """Return what is still held, if anything: before an evaluation, a checkpoint and after the last step."""
    import jax

    pending, self._pending = self._pending, None
    return pending and (pending[0], jax.device_get(pending[1]))


class Throughput:
  """Tokens per second of training alone: the compile comes before the first tick, `paused` takes out evaluations.

  Args:
    tokens_per_step: tokens of one optimizer step over all processes.
    flops_per_token: forward and backward model FLOPs.
    peak_flops: FLOP/s of all devices together; 0 is unknown and leaves MFU out.
    window: ticks in the moving figure.
  """

  def __init__(
      self, tokens_per_step: int, flops_per_token: float = 0.0, peak_flops: float = 0.0, window: int = 10,
      clock: Callable[[], float] = time.perf_counter,
  ):
    self._tokens_per_step = tokens_per_step
    self._flops_per_second_of_rate = flops_per_token / peak_flops if peak_flops else None
    self._clock, self._paused_seconds = clock, 0.0
    self._first: tuple[int, float] | None = None
    self._ticks: collections.deque[tuple[int, float]] = collections.deque(maxlen=window + 1)

  def tick(self, step: int) -> None:
    """`step` has just finished on the device."""
    self._ticks.append((step, self._clock() - self._paused_seconds))
    self._first = self._first or self._ticks[0]

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Time in this block does not count; drain the late metrics first, or a running step hides in the pause."""
    start = self._clock()
    try:
      yield
    finally:
      self._paused_seconds += self._clock() - start

  def moving(self) -> dict[str, float]:
    """`tokens_per_second` and, with a known peak, `mfu` over the window; empty before the second tick."""
    return self._between(self._ticks[0]) if self._ticks else {}

  def overall(self) -> dict[str, float]:
    """The same since the first tick."""
    return self._between(self._first) if self._first else {}

  def _between(self, start: tuple[int, float]) -> dict[str, float]:
    steps, seconds = self._ticks[-1][0] - start[0], self._ticks[-1][1] - start[1]
    if steps <= 0 or seconds <= 0:
      return {}
    rate = steps * self._tokens_per_step / seconds
    known_peak = self._flops_per_second_of_rate is not None
    return {'tokens_per_second': rate, **({'mfu': rate * self._flops_per_second_of_rate} if known_peak else {})}


class Progress:
  """One bar per run on a terminal; elsewhere (a log file, CI) a plain line about every tenth of the way.

  The time left counts everything since the first update, evaluations and checkpoints too; `run` of `runs` adds that of
  the runs to come, supposing that they are alike.
  """

  def __init__(
      self, arm: str, seed: int, steps: int, *, start_step: int = 0, run: int = 1, runs: int = 1,
      stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic,
  ):
    self._name = f'{arm}/seed{seed}' + (f' [{run}/{runs}]' if runs > 1 else '')
    self._steps, self._runs_to_come = steps, runs - run
    self._stream, self._clock = stream or sys.stderr, clock
    self._start: tuple[int, float] | None = None
    self._heldout_loss: float | None = None
    self._next_line = start_step + 1  # the first line says that the compile is over
    self._bar = None
    if self._stream.isatty():
      from tqdm import tqdm

      columns, rows = shutil.get_terminal_size()  # never 0, where tqdm's own measure hides the bar (pty without a size)
      self._bar = tqdm(
          total=steps, initial=start_step, desc=self._name, file=self._stream, ncols=columns - 1, nrows=rows,
          bar_format='{desc} {bar} {n_fmt}/{total_fmt}{postfix}',
      )
      self._bar.set_postfix_str('compiling')

  def update(
      self, step: int, loss: float, tokens_per_second: float | None = None, heldout_loss: float | None = None
  ) -> None:
    """`heldout_loss` stays on show until the next one (a terminal of 80 columns has no room for it)."""
    self._start = self._start or (step, self._clock())
    self._heldout_loss = self._heldout_loss if heldout_loss is None else heldout_loss
    narrow = self._bar is not None and self._bar.ncols < 95
    parts = [f'loss {loss:.3f}']
    parts += [f'held-out {self._heldout_loss:.3f}'] if self._heldout_loss is not None and not narrow else []
    parts += [f'{short_number(tokens_per_second)} tok/s'] if tokens_per_second else []
    parts += [self._time_left(step)] if step > self._start[0] else []
    if self._bar is not None:
      self._bar.ncols = shutil.get_terminal_size().columns - 1
      self._bar.set_postfix_str(' '.join(parts), refresh=False)
      self._bar.n = step
      self._bar.refresh()  # not `update`, which skips a second call for one step: that of the held-out loss
    elif step >= min(self._next_line, self._steps):
      self._next_line = (10 * step // self._steps + 1) * self._steps / 10
      self.note(f'{self._name}  {step}/{self._steps}  ' + '  '.join(parts))

  def note(self, line: str) -> None:
    """Print a line, above the bar if there is one."""
    if self._bar is not None:
      self._bar.write(line, file=self._stream)
    else:
      print(line, file=self._stream, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def _time_left(self, step: int) -> str:
    start_step, start_time = self._start
    seconds_per_step = (self._clock() - start_time) / (step - start_step)
    here = seconds_per_step * (self._steps - step)
    after = seconds_per_step * self._steps * self._runs_to_come
    return f'{clock_time(here)} left' + (f', all {clock_time(here + after)}' if after else '')


def short_number(value: float) -> str:
  """Three digits and a suffix: 812, 5.21k, 17.8B."""
  for size, suffix in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if abs(value) >= 0.9995 * size:
      scaled = value / size
      return f'{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f}{suffix}'
  return f'{value:.0f}' if abs(value) >= 99.5 or value == int(value) else f'{value:.3g}'


def clock_time(seconds: float) -> str:
  """0:42, 12:07, 3:05:09."""
  minutes, seconds = divmod(int(seconds + 0.5), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'


def memory_stats() -> dict[str, float]:
  """GiB: `memory/device_in_use` and `memory/device_peak` of the fullest local device (absent on CPU), `memory/host`."""
  import jax

  stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
  tags = {'memory/device_in_use': 'bytes_in_use', 'memory/device_peak': 'peak_bytes_in_use'}
  memory = {tag: max(s.get(key, 0) for s in stats) / GIB for tag, key in tags.items() if any(key in s for s in stats)}
  return {**memory, 'memory/host': _host_bytes() / GIB}


def _host_bytes() -> float:
  """Resident memory of this process; the peak where the system does not tell the present value."""
  status = pathlib.Path('/proc/self/status')
  if status.exists() and (found := re.search(r'VmRSS:\s+(\d+) kB', status.read_text())):
    return 1024.0 * int(found.group(1))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return float(peak) if sys.platform == 'darwin' else 1024.0 * peak
