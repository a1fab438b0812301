"""softtrellis inspect"""

from __future__ import annotations

import argparse
from pathlib import Path

from softtrellis.cli.common import Commands, command


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = command(
        commands,
        "inspect",
        "show what is in a checkpoint, with bits per weight counted from the bytes",
        "softtrellis inspect smollm2-2bit",
    )
    parser.add_argument("checkpoint", help="a checkpoint's directory")
    parser.add_argument("--no-verify", action="store_true", help="do not compare checksums")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the manifest in words."""
    from softtrellis.io.checkpoint import describe_sizes, read_manifest, verify_files
    from softtrellis.io.manifest import codes_of
    from softtrellis.io.model_card import plain

    directory = Path(options.checkpoint)
    manifest = read_manifest(directory)
    if not options.no_verify:
        verify_files(directory, manifest)
    print(f"softtrellis checkpoint, version {manifest.version}")
    print(f"base model   {manifest.base.name} (licence {manifest.base.licence})")
    for code in codes_of(manifest.layers):
        print(f"code         {code.name}, L={code.spec.L} k={code.spec.k} V={code.spec.V}")
    checked = "not compared" if options.no_verify else "match"
    print(f"files        {len(manifest.files)}, checksums {checked}")
    print(describe_sizes(directory))
    print(f"\n{'layer':45}     out x in     tiles  bits")
    for name, layer in manifest.layers.items():
        shape = f"{layer.out_features:5} x {layer.in_features:<5}"
        print(f"{name:45}  {shape}  {layer.tiles:6}  {layer.code.spec.k:4}")
    for name, value in manifest.provenance.items():
        print(f"\n{name}: {plain(value)}")
    return 0
