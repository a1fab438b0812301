"""Text that the full-precision model writes itself, for when there is no corpus."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softtrellis.io.progress import progress
from softtrellis.io.sources import fingerprint, muted
from softtrellis.io.text import TEACHER
from softtrellis.modules.replace import on_device
from softtrellis.recipes.run_state import digest, read_tensors, sampled, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GREEDY_TOKENS = 4
"""Most likely tokens that follow a random first one, before tokens are drawn (LLM-QAT: 3 to 5)."""


def is_teacher_text(sources: Sequence[str]) -> bool:
    """Whether the text is to be sampled from the teacher instead of loaded.

    Raises:
        ValueError: "teacher" beside other sources, which only training takes.
    """
    if TEACHER in sources and len(sources) > 1:
        raise ValueError(
            f"'{TEACHER}' cannot be mixed with other text for calibration, only for training: "
            "give it alone."
        )
    return TEACHER in sources


def is_mixture(sources: Sequence[str]) -> bool:
    """Whether some of the text is to be loaded, and the rest sampled from the teacher.

    Raises:
        ValueError: "teacher" more than once.
    """
    if sources.count(TEACHER) > 1:
        raise ValueError(f"'{TEACHER}' must be named once, got {' '.join(sources)}")
    return TEACHER in sources and len(sources) > 1


def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    ctx: int,
    *,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    cache: Path | None = None,
    show_progress: bool = False,
) -> Tensor:
    """Windows of tokens drawn from a model's own predictions (LLM-QAT, arXiv 2305.17888).

    A window starts with the BOS token and, where the tokenizer has none, with a random token that
    is not special, after which the ``GREEDY_TOKENS`` most likely ones make a plausible beginning.
    Every other token is drawn. EOS does not end a window: it is kept, and the model goes on as its
    own training text did, with a new document or, in a chat, the next turn. So at temperature 1
    windows that start with BOS are samples of the model's distribution, nothing added or left out.

    The same arguments on the same device give the same tokens; ``batch`` is one of them. The
    generators of torch, and the model, are left as they were.

    Args:
        model: a causal language model with a ``generate`` method.
        tokenizer: its own. Ids that it does not have are never drawn.
        count: windows.
        ctx: tokens per window, at least 2.
        seed: of what is drawn.
        temperature: divides the logits.
        top_k: draw from so many most likely tokens only; None is all.
        top_p: draw from the most likely tokens of this total probability only; None is all.
        batch: windows at once; their keys and values take most of the memory. None: 128 on a CPU,
            and on a GPU as many as take a quarter of its memory, a power of two, at most 1024.
        device: where the model runs; None is where it is. It is moved there and back.
        dtype: what the model runs in; None is its own. In another one a copy of it runs.
        cache: a directory that keeps the windows, under a name made of the model and all settings,
            and gives them back without sampling. None keeps nothing.
        show_progress: show a progress bar.

    Returns:
        int64 [count, ctx], on the CPU.

    Raises:
        ValueError: sizes below the least, a temperature or top_p out of range, or a damaged file
            in ``cache``.
    """
    for name, value, least in (("count", count, 1), ("ctx", ctx, 2), ("batch", batch, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, got {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}.")
    place = model.device if device is None else torch.device(device)
    dtype = model.dtype if dtype is None else dtype
    batch = _windows_at_once(model, ctx, dtype, place) if batch is None else batch
    path = None
    if cache is not None:
        settings = (count, ctx, seed, temperature, top_k, top_p, batch, place.type, str(dtype))
        path = cache / f"teacher-{_key(model, tokenizer, settings)}.safetensors"
        if path.is_file():
            return _read(path, count, ctx)
    if model.dtype != dtype:
        model = copy.deepcopy(model).to(dtype)  # type: ignore[arg-type]
    drawn = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0}
    drawn["top_p"] = 1.0 if top_p is None else top_p
    windows: list[Tensor] = []
    with (
        _ready(model, place),
        _seeded(place, seed),
        progress(count, "sample", enabled=show_progress) as bar,
    ):
        for ids in _first_tokens(tokenizer, count, seed).split(batch):
            ids = ids.to(place)
            if tokenizer.bos_token_id is None:
                new = min(GREEDY_TOKENS, ctx - 1)
                ids = _extend(model, tokenizer, ids, new, do_sample=False)
            ids = _extend(model, tokenizer, ids, ctx - ids.shape[1], **drawn)
            windows.append(ids.cpu())
            bar.update(len(ids))
    found = torch.cat(windows)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"windows": found}, {})
    return found


def _windows_at_once(
    model: PreTrainedModel, ctx: int, dtype: torch.dtype, device: torch.device
) -> int:
    if device.type == "cpu":
        return 128
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    stored = 2 * config.num_hidden_layers * getattr(config, "num_key_value_heads", heads) * width
    most: int = torch.cuda.get_device_properties(device).total_memory // 4
    fit = most // (int(stored) * ctx * dtype.itemsize)
    return min(1 << max(fit.bit_length() - 1, 0), 1024)


def _extend(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    new: int,
    **settings: bool | int | float,
) -> Tensor:
    """int64 [n, m + new], so many tokens after ids [n, m]; EOS is a token like any other."""
    from transformers import GenerationConfig

    if new == 0:
        return ids
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new,
        suppress_tokens=_unknown_ids(model, tokenizer),
        use_cache=True,
        **settings,
    )
    with muted("transformers"):
        extended: Tensor = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
    return extended


def _first_tokens(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> Tensor:
    """int64 [count, 1]: BOS, or random tokens that are not special."""
    if tokenizer.bos_token_id is not None:
        return torch.full((count, 1), int(tokenizer.bos_token_id))
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - special))
    generator = torch.Generator().manual_seed(seed)
    return plain[torch.randint(len(plain), (count, 1), generator=generator)]


def _unknown_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Ids that the model has logits for and the tokenizer no token, as in padded vocabularies."""
    vocabulary = range(int(model.config.get_text_config().vocab_size))
    return sorted(set(vocabulary) - set(tokenizer.get_vocab().values())) or None


@contextmanager
def _ready(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Has a model in eval mode on a device, without generation settings of its own."""
    from transformers import GenerationConfig

    # What generate() is not told it takes from the model: EOS, top_k, penalties.
    its_own, training = model.generation_config, model.training
    try:
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        model.eval()  # type: ignore[no-untyped-call]
        with on_device(model, device):
            yield
    finally:
        model.generation_config = its_own
        model.train(training)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seeds the generator that draws on a device, and puts it back."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        yield


def _key(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: tuple[object, ...]
) -> str:
    """A name for what is drawn; quantized models have their teacher's fingerprint, not its key."""
    weights = digest(sampled(tensor) for tensor in model.state_dict().values())
    tokens = sorted(tokenizer.get_vocab().items())
    parts = [fingerprint(model), weights, str(model.dtype), tokenizer.bos_token_id, tokens]
    return hashlib.sha256(json.dumps([*parts, *settings]).encode()).hexdigest()[:32]


def _read(path: Path, count: int, ctx: int) -> Tensor:
    try:
        windows = read_tensors(path, torch.device("cpu"))[1]["windows"]
        if windows.shape != (count, ctx) or windows.dtype != torch.int64:
            raise ValueError(f"{tuple(windows.shape)} {windows.dtype}")
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: delete it, and the text is sampled again.") from error
    return windows
