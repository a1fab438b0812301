import math
from importlib.util import find_spec
from pathlib import Path

import pytest

from softtrellis.evaluation import tensorboard
from softtrellis.evaluation.tensorboard import TensorBoardLog

RECORDS = [
    {
        "step": step,
        "loss": 1.0 / (step + 1),
        "drift": 0.1 * step,
        "heldout_kl": None,
        "layers": {"model.layers.0.mlp.up_proj": {"drift": 0.2 * step}},
    }
    for step in range(4)
]


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"\.venv/bin/pip install -e '\.\[tensorboard\]'"):
        TensorBoardLog(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs the package tensorboard")
class TestWithThePackage:
    def test_numbers_of_the_run_and_of_its_layers(self, tmp_path: Path) -> None:
        with TensorBoardLog(tmp_path) as log:
            for record in RECORDS:
                log.append(record)
        found = scalars(tmp_path)
        assert found.keys() == {"train/loss", "train/drift", "drift/model.layers.0.mlp.up_proj"}
        assert found["train/loss"] == [(i, pytest.approx(1 / (i + 1))) for i in range(4)]
        assert found["drift/model.layers.0.mlp.up_proj"][3] == (3, pytest.approx(0.6))

    def test_a_resumed_run_replaces_the_steps_from_there(self, tmp_path: Path) -> None:
        with TensorBoardLog(tmp_path) as log:
            for record in RECORDS:
                log.append(record)
        with TensorBoardLog(tmp_path, resume_at=2) as log:
            log.append({"step": 2, "loss": math.nan})
            log.append({"step": 3, "loss": 5.0})
        assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [0, 1, 2, 3]
        assert scalars(tmp_path)["train/loss"][3] == (3, 5.0)
