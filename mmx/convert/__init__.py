"""Hugging Face checkpoints in and out: `python -m mmx.convert import | export | verify`.

  safetensors_io   the file format, a tensor at a time
  mapping          one line per tensor: its name, our leaf, how axes merge; both directions follow from it
  m2 text01 m3     the tables and config.json of each family
  importer         a Hugging Face folder into a run folder, or straight onto a mesh
  exporter         and back
  verify           logits against a reference
"""
