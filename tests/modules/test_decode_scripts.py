"""Scripts that measure decoding change the kernels' sources, which have to be as they expect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def test_scripts_know_the_kernels(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    import bench_decode_kernels
    import bench_decode_layers
    import bench_decode_timeline

    bench_decode_timeline.timed(tmp_path, torch.zeros(1, dtype=torch.int64))
    bench_decode_layers.written(tmp_path)
    bench_decode_kernels.write_variants(tmp_path)
    sources = sorted(path.name for path in tmp_path.glob("*.cu"))
    assert sources == [
        "decode_variants.cu", "early.cu", "more.cu", "timed_decode.cu",
        "timed_rotation.cu", "timed_rotation_blocks.cu", "timed_rotation_columns.cu",
    ]  # fmt: skip
