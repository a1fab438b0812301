"""Two ranks save states again and again, and one is killed; tests/recipes/test_sharded_state.py.

python kill_ranks.py FOLDER KILLS

Before each operation on files in turn one rank is killed, and the other one with it. What is left
is the state before or the one after, whole. Prints how many states of which step were left. In the
end the disk is full for one rank: both give up, and the state before is left.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint  # forks then need not
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from softtrellis.recipes.ranks import Ranks
from softtrellis.recipes.run_state import load_state, save_state

FULL, NEVER = -1, 10**6

TILES, STEPS = 3, 2
OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def tensors(step: int, ranks: Ranks) -> dict[str, Any]:
    assert ranks.mesh is not None
    own = torch.full((2 - ranks.rank, 4), float(step))
    shared = DTensor.from_local(own, ranks.mesh, [Shard(0)], shape=(TILES, 4), stride=(4, 1))
    return {"0/a.latent": shared, "0/skipped": torch.tensor(step)}


def rank(number: int, folder: Path, killed: int, operation: int) -> NoReturn:
    """Saves two states over a first one; the one that is ``killed`` dies before an operation.

    With ``FULL`` as the operation it finds no room for its part. Exits with 3 if it gives up.
    """
    code = 1
    try:
        torch.set_num_threads(1)
        store = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=number, world_size=2)
        ranks = Ranks(init_device_mesh("cpu", (2,)))
        run = folder / "run"
        save_state(run, tensors(0, ranks), step=1, settings={}, ranks=ranks)
        ranks.agree(None)
        done = count()

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if number != killed or event not in OPERATIONS:
                return
            path = str(arguments[0])
            if operation == FULL and "shard-" in path:
                raise OSError(errno.ENOSPC, "no space left")
            if path.startswith(str(run)) and next(done) == operation:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        for step in range(1, STEPS + 1):
            save_state(run, tensors(step, ranks), step=step + 1, settings={}, ranks=ranks)
        code = 0
    except OSError as error:
        code = 3 if error.errno == errno.ENOSPC else 1
    except BaseException:
        if operation in (FULL, NEVER):
            traceback.print_exc()
    finally:
        os._exit(code)


def left(run: Path) -> int:
    """The step of the state that is there; all of it is of that step."""
    state = load_state(run, settings={})
    assert state.shared is not None
    found = [load_file(path)["0/a.latent"] for path in state.shared.directory.iterdir()]
    assert sum(map(len, found)) == TILES
    step = int(state.tensors["0/skipped"])
    assert state.step == step + 1
    assert all(bool((part == step).all()) for part in found)
    save_state(run, {}, step=9, settings={})
    assert not [path for path in run.iterdir() if path.is_dir()]
    return step


def trial(folder: Path, killed: int, operation: int) -> int:
    """The step that is left after one kill."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "run").mkdir(parents=True)
    children = []
    for number in (0, 1):
        child = os.fork()
        if child == 0:
            rank(number, folder, killed, operation)
        children.append(child)
    ended, status = os.wait()
    (other,) = {*children} - {ended}
    if os.WIFSIGNALED(status):  # as torchrun does when one of them ends
        os.kill(other, signal.SIGKILL)
    codes = {os.waitstatus_to_exitcode(each) for each in (status, os.waitpid(other, 0)[1])}
    if operation == FULL:
        assert codes == {3}
        assert len([path for path in (folder / "run").iterdir() if path.is_dir()]) == 1
    return left(folder / "run")


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    assert trial(folder, 0, NEVER) == STEPS
    steps: Counter[int] = Counter()
    for operation in range(kills):
        for killed in (0, 1):
            steps[trial(folder, killed, operation)] += 1
    assert trial(folder, 1, FULL) == 0
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
