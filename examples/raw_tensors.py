#!/usr/bin/env python3
"""Writes a model as embed.cpp reads it: config.bin, a prt_model_config, and every tensor as NAME.bin, its numbers as f32.

python raw_tensors.py MODEL FOLDER        # MODEL: a name, a hub repository, a folder or a file, as everywhere
embed_cpp FOLDER 24 1 2 3                 # 24 tokens after the prompt 1 2 3
"""

from __future__ import annotations

import sys
from pathlib import Path

from pyruntime import catalog, download
from pyruntime.checkpoint import open_checkpoint
from pyruntime.session import core_config


def write(model: str, folder: Path) -> None:
    checkpoint = open_checkpoint(download.fetch(catalog.resolve(model)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.bin").write_bytes(core_config(checkpoint.config, checkpoint.config.dtype))
    for name, tensor in checkpoint.tensors.items():
        tensor.read().tofile(folder / f"{name}.bin")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    write(sys.argv[1], Path(sys.argv[2]))
