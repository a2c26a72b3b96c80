"""Package definition. `pip install -e .` trains; extras add tests, peers and accelerators."""

import pathlib

from setuptools import find_packages, setup

setup(
    name='mmx',
    version='0.1.0',
    description='Study, ablate, scale and serve MiniMax-class models in JAX',
    long_description=pathlib.Path(__file__).with_name('README.md').read_text(),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['mmx', 'mmx.*']),
    python_requires='>=3.11',
    install_requires=[
        'jax>=0.10.2,<0.13',
        'flax>=0.12.8',
        'optax>=0.2.8',
        'orbax-checkpoint>=0.12.8',
        'grain>=0.2.18',
        'array-record>=0.8',
        'absl-py>=2.5',
        'gin-config>=0.5',
        'tensorboard>=2.21',
        'tokenizers>=0.21',
        'matplotlib>=3.9',
        'tqdm>=4.66',
        'etils[epath]>=1.10',
        'fsspec>=2025.3',
    ],
    extras_require={
        'test': ['pytest>=8', 'pytest-xdist>=3.6'],
        'hf': ['torch>=2.7', 'transformers>=5.23'],
        # Compilers for chips that are not here: libtpu, and the CUDA plugin without a toolkit.
        'aot': ['jax[tpu]>=0.10.2,<0.13', 'jax-cuda13-plugin>=0.10.2,<0.13', 'jax-cuda13-pjrt>=0.10.2,<0.13',
                'nvidia-cudnn-cu13'],
        'tpu': ['jax[tpu]>=0.10.2,<0.13'],
        'cuda': ['jax[cuda13]>=0.10.2,<0.13'],
        'gcs': ['gcsfs>=2025.3'],  # workdirs such as gs://bucket/run
    },
)
