"""Generating text: once from a prompt, or turn by turn in a conversation."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from softtrellis.backend import ComputeType, compute_dtype
from softtrellis.io.checkpoint import load_any
from softtrellis.io.sources import Source, muted
from softtrellis.modules.replace import cast_, hold_weights_
from softtrellis.recipes.seeds import check_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

Weights = Literal["auto", "packed", "dense"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateConfig:
    """How text is generated.

    Attributes:
        max_tokens: how many at most.
        temperature: 0 takes the most likely token each time; above 0 tokens are sampled.
        top_p: sample among the most likely tokens that together have this probability.
        seed: of the sampling.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        check_seed(self.seed)


def load_for_generation(
    name: str, *, weights: Weights = "auto", device: str = "cpu", dtype: ComputeType = "auto"
) -> Source:
    """A checkpoint or a full-precision model, ready to generate.

    Args:
        name: as ``load_any`` takes it.
        weights: "packed" decodes each layer at each token, which needs little memory and is slow
            except in bfloat16 on a GPU, where fused kernels multiply with the codes; "dense"
            decodes once, into as much memory as the dense model takes; "auto" is "dense" on the
            CPU and "packed" on a GPU.
        device: where the model goes.
        dtype: of activations and of all that is not packed: "bfloat16" or "float32"; "auto" is the
            first on a GPU, the second on a CPU.

    Raises:
        ValueError: another word for ``weights`` or ``dtype``.
    """
    wanted = compute_dtype(dtype, device)
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be one of {', '.join(get_args(Weights))}, got {weights!r}")
    source = load_any(name, device=device)
    cast_(source.model, wanted)
    if weights == "auto":
        weights = "dense" if device == "cpu" else "packed"
    if weights == "dense":
        hold_weights_(source.model, source.model.dtype)
    return source


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    config: GenerateConfig,
    *,
    streamer: BaseStreamer | None = None,
) -> str:
    """The text that follows ``prompt``, up to the end of the text or ``max_tokens``.

    Where the model's context ends before that, so does the text, and a warning is logged.

    Args:
        model, tokenizer: of a causal language model.
        prompt: plain text, without a chat template.
        config: see ``GenerateConfig``; ``seed`` is set first.
        streamer: gets the tokens as they come.

    Raises:
        ValueError: a prompt without tokens, or one that fills the model's context.
    """
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.numel() == 0:
        raise ValueError("prompt must have at least one token")
    limit = _context(model)
    room = limit - ids.shape[1]
    if room < 1:
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens, and the model's context is {limit}; shorten it"
        )
    if config.max_tokens > room:
        _log.warning("the model's context of %d tokens ends the text after %d", limit, room)
        config = replace(config, max_tokens=room)
    torch.manual_seed(config.seed)
    return _continue(model, tokenizer, ids.to(torch.int64), config, streamer)


class MessageTooLong(ValueError):
    """A message that does not fit the model's context by itself; the conversation can go on."""


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            "the model has no chat template; continue plain text with 'softtrellis generate'"
        )


class Chat:
    """A conversation in the model's chat template.

    Attributes:
        messages: what was said, as the template takes it: {"role": ..., "content": ...}.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GenerateConfig,
        *,
        system: str | None = None,
    ) -> None:
        """Sets the seed; ``system`` is the message that every conversation starts with.

        Raises:
            ValueError: a tokenizer without a chat template.
        """
        check_chat_template(tokenizer)
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = []
        self.reset()
        torch.manual_seed(config.seed)

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages = list(self._system)

    def reply(self, text: str, *, streamer: BaseStreamer | None = None) -> str:
        """The answer to ``text``; both are kept for the next turn.

        Where the conversation and ``max_tokens`` no longer fit the model's context, the oldest
        turns are left out, and a warning is logged.

        Raises:
            MessageTooLong: a text that does not fit by itself; what was said before is kept.
        """
        said = [*self.messages, {"role": "user", "content": text}]
        ids = self._fit(said)
        answer = _continue(self._model, self._tokenizer, ids, self._config, streamer)
        self.messages = [*said, {"role": "assistant", "content": answer}]
        return answer

    def _fit(self, messages: list[dict[str, str]]) -> Tensor:
        """int64 [1, n]: the templated messages, shortened in place to what fits."""
        limit = _context(self._model)
        start, dropped = len(self._system), 0
        while True:
            encoded: Any = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            ids = encoded["input_ids"]
            if ids.shape[1] + self._config.max_tokens <= limit:
                break
            if len(messages) - start < 3:
                raise MessageTooLong(
                    f"the message has {ids.shape[1]} tokens and up to {self._config.max_tokens} "
                    f"may follow, but the model's context is {limit}; shorten it or lower "
                    "--max-tokens"
                )
            del messages[start : start + 2]
            dropped += 1
        if dropped:
            _log.warning("the context is full: the oldest %d turns were left out", dropped)
        tokens: Tensor = ids.to(torch.int64)
        return tokens


def _context(model: PreTrainedModel) -> int:
    """How many tokens the model can look at; without a limit a very large number."""
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    config: GenerateConfig,
    streamer: BaseStreamer | None,
) -> str:
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p}
    ids = ids.to(model.device)
    with muted("transformers"):
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=config.max_tokens,
            pad_token_id=_padding(model, tokenizer),
            top_k=0 if config.temperature > 0 else None,
            streamer=streamer,
            **sampling,
        )
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token: there is nothing to pad, but transformers asks for one."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0
