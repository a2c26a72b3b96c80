"""A program of an experiment compiled for chips that are not here, and what is known of it then. Needs the extra `aot`.

The compiler says what each chip holds; products, memory traffic and collectives are read off its program (hlo.py), and
bound the time from below: instructions one after the other, each as long as the longer of its products at the peak rate
and its bytes at the memory's, with the links' time hidden behind them or not at all.
"""

import dataclasses
import resource
import time

from mmx import config, flops, hlo, topology


@dataclasses.dataclass(frozen=True)
class Proof:
  """What is known of one step of an experiment on a slice. Bytes, FLOPs and seconds are of one chip and one step."""

  topology: str
  mode: str  # of PROGRAMS
  chips: int
  mesh: dict[str, int]
  parameters: int
  active: int
  tokens: int  # of a step, all chips
  arguments: int  # parameters, optimizer state and batch
  temporaries: int
  peak: int  # what is alive at once at most, arguments included
  memory: float  # of the chip
  model_flops: float  # that the model needs, as in MFU
  executed_flops: float  # of the program: with what is computed again
  traffic: float  # bytes read and written, at most
  collectives: list[hlo.Collective]
  # compute, memory, links: each alone at full rate. chip: instructions one after the other, each as long as the longer
  # of its products and its bytes.
  seconds: dict[str, float]
  peak_flops: float  # of a chip, a second
  compile_seconds: float
  host_memory: int  # of the compiling process, at most

  @property
  def least(self) -> float:
    """Seconds of a step if chips never wait for each other: what they send travels while they work."""
    return max(self.seconds['chip'], self.seconds['links'])

  @property
  def most(self) -> float:
    """Seconds of a step if chips stand still while anything travels."""
    return self.seconds['chip'] + self.seconds['links']

  def utilisation(self, seconds) -> float:
    """Share of the chip's peak at work on the model, as in MFU, if a run takes that long."""
    return self.model_flops / self.peak_flops / seconds


class DoesNotFit(RuntimeError):
  """The compiler refused the program for want of memory; the message is its line."""


def prove(experiment: config.Experiment, name: str, mode: str = 'train') -> Proof:
  """Compiles a program of PROGRAMS for the topology `name`.

  Raises:
    ConfigError: the configuration does not suit that many chips.
    DoesNotFit: the compiler says that memory does not suffice.
  """
  import jax

  from mmx import sharding

  _, chip, chips = topology.parse(name)
  config.validate(experiment, chips)
  devices = topology.devices_of(name)
  try:
    mesh = sharding.build_mesh(experiment.mesh, devices)
  except (NotImplementedError, ValueError) as error:
    sizes = config.resolve_mesh(experiment.mesh, chips)
    raise config.ConfigError(
        f'--topology={name}: mesh {sizes} cannot be laid on it: each axis must be a product of sides of the slice'
    ) from error
  platform = {'gpu': 'cuda'}.get(sharding.platform_of(mesh), sharding.platform_of(mesh))
  began = time.perf_counter()
  traced = PROGRAMS[mode](experiment, mesh)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # else kernels ask this host what kind of chip it is
    lowered = traced.lower(lowering_platforms=(platform,))
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' in str(error):
      line = ' '.join(str(error).removeprefix('RESOURCE_EXHAUSTED: ').split())
      raise DoesNotFit(f'--topology={name}: {line}') from error
    raise
  compile_seconds = time.perf_counter() - began

  memory = compiled.memory_analysis()
  computations, entry = hlo.parse(compiled.as_text())
  times = hlo.runs(computations, entry)
  count = flops.count_parameters(experiment.model)
  tokens = tokens_of(experiment, mode)
  model_flops, between_tokens = needed_flops(experiment, mode)
  work = executed(
      hlo.work(computations, times), fill(experiment, mesh, tokens), between_tokens / chips, model_flops / chips
  )
  executed_flops, traffic = sum(w.flops for w in work), sum(w.bytes for w in work)
  collectives = hlo.collectives(computations, times)
  peak_flops = flops.peak_flops(devices[0], experiment.model.compute_dtype)
  return Proof(
      topology=name, mode=mode, chips=chips, mesh=dict(mesh.shape), parameters=count.total,
      active=count.active, tokens=tokens, arguments=memory.argument_size_in_bytes,
      temporaries=memory.temp_size_in_bytes, peak=memory.peak_memory_in_bytes, memory=chip.memory,
      model_flops=model_flops / chips, executed_flops=executed_flops, traffic=traffic, collectives=collectives,
      seconds={
          'compute': executed_flops / peak_flops,
          'memory': traffic / chip.memory_rate,
          'links': sum(c.bytes for c in collectives) / chip.links,
          'chip': sum(max(w.flops / peak_flops, w.bytes / chip.memory_rate) for w in work),
      },
      peak_flops=peak_flops, compile_seconds=compile_seconds,
      host_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  )


# ----------------------------------------------------------------------------------------------------------------------
# the programs


def trace_training(experiment, mesh):
  from mmx import train_step

  return train_step.trace_train_step(experiment, mesh)


def trace_serving(experiment, mesh, new_tokens):
  """`new_tokens` for each row of data.batch_size, against caches of data.seq_len slots: the logits behind the last one,
  and the caches with them. Parameters stand in model.compute_dtype, caches' rows over the batch's axes and their heads
  over `tensor`."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec as P

  from mmx import model, sharding, train_step

  m, B = experiment.model, experiment.data.batch_size
  dtype = jnp.dtype(m.compute_dtype)
  state = train_step.abstract_state(experiment, mesh)
  params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype, sharding=a.sharding), state.params)

  def placed(leaf):
    heads = 'tensor' if leaf.ndim == 5 and leaf.shape[2] % mesh.shape['tensor'] == 0 else None
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P(None, sharding.BATCH_AXES, heads))
    )

  cache = jax.tree.map(placed, jax.eval_shape(lambda: model.init_cache(m, B, experiment.data.seq_len)))
  rows = NamedSharding(mesh, P(sharding.BATCH_AXES))
  tokens = jax.ShapeDtypeStruct((B, new_tokens), jnp.int32, sharding=rows)

  def serve(params, router, cache, tokens_BT, positions_BT):
    variables = {'params': params, 'router': router}
    out = model.Decoder(m, mesh).apply(variables, tokens_BT, positions_BT, jnp.ones_like(tokens_BT), cache)
    last_BD = out.hidden[:, -1]
    return jnp.matmul(last_BD, out.head.astype(last_BD.dtype), preferred_element_type=jnp.float32), out.cache

  shardings = None, jax.tree.map(lambda leaf: leaf.sharding, cache)
  step = jax.jit(serve, donate_argnums=2, out_shardings=shardings)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return step.trace(params, state.router, cache, tokens, tokens)


PROGRAMS = {
    'train': trace_training,
    'prefill': lambda experiment, mesh: trace_serving(experiment, mesh, experiment.data.seq_len),
    'decode': lambda experiment, mesh: trace_serving(experiment, mesh, 1),
}


def tokens_of(experiment, mode) -> int:
  """Tokens that go through the model in a run of the program."""
  rows = experiment.data.batch_size
  return rows if mode == 'decode' else rows * experiment.data.seq_len


def needed_flops(experiment, mode) -> tuple[float, float]:
  """(FLOPs that the model needs for a run, as in MFU; those of them that its attention's kernels spend, with what
  rematerialisation repeats). Decoding is against full caches."""
  model, T = experiment.model, experiment.data.seq_len
  layers = [layer for s in config.parse_pattern(model.pattern) for layer in s.unit * s.repeats]
  training = mode == 'train'
  if training:
    layers += layers[-1:] * model.mtp.depth
  tokens = tokens_of(experiment, mode)
  mixing = sum(flops.mixing_flops(model, layer.mixer, T) for layer in layers)
  if training:
    passes = 3 if model.remat in ('none', 'mixer') else 4
    return flops.step_flops(experiment) * tokens, passes * mixing * tokens
  matrices = 2 * flops.count_parameters(model).active * tokens
  mixing *= 2 if mode == 'decode' else 1  # the last token sees all keys, tokens of a row half of them
  head = 2 * model.d_model * model.vocab_size * experiment.data.batch_size
  return matrices + mixing * tokens + head, mixing * tokens


def fill(experiment: config.Experiment, mesh, tokens) -> float:
  """Share of the rows kept for experts that come where loads are even."""
  from mmx.layers import moe_transport

  moe = experiment.model.moe
  N = max(1, tokens // experiment.train.accumulate * mesh.shape['tensor'] // mesh.size)
  capacity = moe_transport.capacity_of(N, moe.top_k, moe.num_experts, moe.capacity_factor)
  kept = moe_transport.rows_kept(N, moe.top_k, moe.num_experts, mesh.shape['expert'], capacity)
  return min(1.0, N * moe.top_k / kept)


def executed(work: list[hlo.Work], fill, mixing_flops, model_flops) -> list[hlo.Work]:
  """`work` with the FLOPs that kernels do: those of experts state full buffers, of which `fill` is full where loads are
  even; those of attention state none and share `mixing_flops`, and on GPU, where none states any, all share at least
  what is left of `model_flops`."""
  silent = sum(w.kernel and not w.flops for w in work)
  stated = sum(w.flops * (fill if w.kernel else 1) for w in work)
  mixing_flops = max(mixing_flops, model_flops - stated)

  def true(w):
    if not w.kernel:
      return w
    return dataclasses.replace(w, flops=w.flops * fill if w.flops else mixing_flops / silent)

  return [true(w) for w in work]
