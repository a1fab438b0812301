"""softtrellis generate and softtrellis chat"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from softtrellis.cli.common import (
    Commands,
    add_device,
    check_backend,
    command,
    usage_errors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TextStreamer

    from softtrellis.io.sources import Source
    from softtrellis.recipes.generation import GenerateConfig

EXIT, RESET = "/exit", "/reset"


def add_parser(commands: Commands) -> None:
    """Adds both commands."""
    parser = command(
        commands,
        "generate",
        "continue a text",
        'softtrellis generate smollm2-2bit --prompt "The capital of France is" --max-tokens 32',
        "Prints what follows the prompt as it is generated; the most likely token each time, "
        "unless --temperature is given.",
    )
    parser.add_argument("model", help="a checkpoint, or a full-precision model")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    _add_options(parser, max_tokens=128, temperature=0.0, top_p=1.0)
    parser.set_defaults(run=run_generate)
    parser = command(
        commands,
        "chat",
        "talk with a model that has a chat template",
        "softtrellis chat smollm2-2bit",
        f"Each line of standard input is a message. {RESET} starts a new conversation, {EXIT} or "
        "the end of the input ends it. A message that is too long is refused, and the conversation "
        "goes on.",
    )
    parser.add_argument("model", help="a checkpoint, or a full-precision model")
    parser.add_argument("--system", metavar="TEXT", help="a system message to start with")
    _add_options(parser, max_tokens=512, temperature=0.7, top_p=0.9)
    parser.set_defaults(run=run_chat)


def _add_options(
    parser: argparse.ArgumentParser, *, max_tokens: int, temperature: float, top_p: float
) -> None:
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help="tokens at most")
    parser.add_argument(
        "--temperature", type=float, default=temperature, help="of sampling; 0 is greedy"
    )
    parser.add_argument(
        "--top-p", type=float, default=top_p, help="sample among tokens of this probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument(
        "--weights",
        choices=["auto", "packed", "dense"],
        default="auto",
        help="packed: decode the layers at every token, small, and slow but in bfloat16 on a GPU; "
        "dense: decode them once, with the memory of the dense model; auto: dense on the CPU, "
        "packed on a GPU",
    )
    add_device(parser, "what runs the model")
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="of activations and all that is not packed; auto is bfloat16 on a GPU, where fused "
        "kernels then multiply with the codes, float32 on a CPU",
    )


def run_generate(options: argparse.Namespace) -> int:
    """Prints a continuation."""
    from softtrellis.recipes.generation import generate_text

    config = _config(options)
    with usage_errors(options):
        if not options.prompt:
            raise ValueError("prompt must have at least one token")
    source = _load(options)
    streamer = _streamer(source.tokenizer)
    generate_text(source.model, source.tokenizer, options.prompt, config, streamer=streamer)
    return 0


def run_chat(options: argparse.Namespace) -> int:
    """Answers each line of standard input."""
    from softtrellis.io.checkpoint import is_checkpoint, load_tokenizer
    from softtrellis.recipes.generation import Chat, MessageTooLong, check_chat_template

    config = _config(options)
    if is_checkpoint(Path(options.model)):
        check_chat_template(load_tokenizer(options.model))  # before its weights are loaded
    source = _load(options)
    chat = Chat(source.model, source.tokenizer, config, system=options.system)
    for line in _lines():
        if line == EXIT:
            break
        if line == RESET:
            chat.reset()
        elif line:
            try:
                chat.reply(line, streamer=_streamer(source.tokenizer))
            except MessageTooLong as error:
                print(f"softtrellis: error: {error}", file=sys.stderr)
    return 0


def _lines() -> Iterator[str]:
    """The lines of standard input; a terminal gets a prompt, on standard error."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def _config(options: argparse.Namespace) -> GenerateConfig:
    from softtrellis.recipes.generation import GenerateConfig

    check_backend("auto", options.device)
    with usage_errors(options):
        return GenerateConfig(options.max_tokens, options.temperature, options.top_p, options.seed)


def _load(options: argparse.Namespace) -> Source:
    import torch

    import softtrellis.integrations.transformers  # noqa: F401 (what save_pretrained wrote, too)
    from softtrellis.modules.decode import resolve_decode_backend
    from softtrellis.modules.replace import quantized_layers
    from softtrellis.recipes.generation import load_for_generation

    source = load_for_generation(
        options.model, weights=options.weights, device=options.device, dtype=options.dtype
    )
    held = [layer.held_weight for layer in quantized_layers(source.model).values()]
    size = sum(weight.nbytes for weight in held if weight is not None)
    if size:
        print(f"weights: dense, {len(held)} layers decoded once, {size:,} bytes", file=sys.stderr)
    elif held:
        like_activations = torch.empty(0, dtype=source.model.dtype, device=source.model.device)
        backend = resolve_decode_backend("auto", like_activations)
        print(
            f"weights: packed, {len(held)} layers decoded at every token by {backend}",
            file=sys.stderr,
        )
    return source


def _streamer(tokenizer: PreTrainedTokenizerBase) -> TextStreamer:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
