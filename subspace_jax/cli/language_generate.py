"""The command that continues prompts, answers them, or talks."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from subspace_jax.cli import language, shared

log = logging.getLogger(__name__)

_GENERATE = """
    subspace-jax generate --model work/tiny/model --prompt "Return the" --max-new-tokens 64
    subspace-jax generate --model DIR --chat                                     # a conversation; Ctrl-D ends it
    subspace-jax generate --model DIR --chat --prompt "What is a subspace?" --temperature 0.8 --top-p 0.95
    subspace-jax generate --model DIR --prompts prompts.jsonl --out replies.jsonl --batch-size 16
    echo "Return the" | subspace-jax generate --model work/tiny/model --adapter work/dora/adapter --prompts -
    """
_MULTIPLE = 32  # lengths of prompts are padded to multiples, so that few programs are compiled


def add_commands(commands) -> None:
    """Adds ``generate``."""
    generate = shared.add_command(commands, "generate", "continue prompts, or chat", _generate, _GENERATE)
    language.add_model(generate)
    generate.add_argument("--prompt", default=None, metavar="TEXT", help="text to continue, or to answer with --chat")
    generate.add_argument(
        "--prompts",
        default=None,
        metavar="FILE",
        help="file of prompts, or - for the standard input: JSON objects with 'prompt' or (with --chat) 'messages', of "
        "which a last reply is left out; or, where the first line begins with no brace, a prompt in each line",
    )
    generate.add_argument(
        "--out",
        default=None,
        metavar="FILE",
        help="new JSONL file for the rows of --prompts, to each of which 'generated' and 'finish_reason' ('stop' or "
        "'length') are added (default: the standard output)",
    )
    generate.add_argument("--batch-size", type=int, default=8, help="prompts of a batch of --prompts (default: 8)")
    generate.add_argument(
        "--chat",
        action="store_true",
        help="render prompts by the chat template; with neither --prompt nor --prompts, read them from the terminal",
    )
    generate.add_argument("--system", default=None, metavar="TEXT", help="system message of --chat (default: none)")
    language.add_chat_template(generate)
    generate.add_argument(
        "--max-new-tokens",
        type=int,
        default=None,
        help="upper limit; the model's end-of-sequence tokens, and with --chat the end of a turn, stop earlier "
        "(default: 64; with --chat 512, or half of the model's positions)",
    )
    generate.add_argument(
        "--temperature", type=float, default=0.0, help="0 is greedy decoding (default); else at least 1e-6"
    )
    generate.add_argument("--top-p", type=float, default=1.0, help="probability mass to sample from (default: 1)")
    generate.add_argument("--seed", type=int, default=0)


def _generate(args: argparse.Namespace, overrides: list[str]) -> None:
    _check(args)
    speaker = _Speaker(args)
    if args.prompts is not None:
        _answer_file(args, speaker)
    elif args.prompt is not None:
        encoded = speaker.encode(_row_of(args.prompt), "--prompt")
        speaker.load()
        if not args.chat:
            print(args.prompt, end="", flush=True)
        speaker.say(encoded, 0)
    else:
        _talk(speaker)


def _check(args: argparse.Namespace) -> None:
    if args.temperature != 0 and not 1e-6 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature: expected 0, or a finite number of at least 1e-6, got {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p: expected a number in (0, 1], got {args.top_p}")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed: expected a number in [0, 2^32), got {args.seed}")
    if args.prompt is not None and args.prompts is not None:
        raise ValueError("--prompt, --prompts: expected one of them, got both")
    if args.prompt is None and args.prompts is None and not args.chat:
        raise ValueError("--prompt: expected a text; or --prompts with a file, or --chat for a conversation")
    for name in ("system", "chat_template"):
        if getattr(args, name) and not args.chat:
            raise ValueError(f"--{name.replace('_', '-')}: is for --chat")
    if args.out is not None and args.prompts is None:
        raise ValueError("--out: is for the rows of --prompts")
    if args.out is not None and Path(args.out).exists():
        raise FileExistsError(f"--out: {args.out} exists")


def _template_of(args: argparse.Namespace) -> str:
    """The template asked for, or else the one that an adapter was trained by; "" for the tokenizer's own."""
    own = Path(args.adapter or "") / "chat_template.jinja"
    return args.chat_template or (str(own) if args.adapter and own.is_file() else "")


class _TooLongError(ValueError):
    """A prompt leaves too few of the model's positions."""


class _Encoded(NamedTuple):
    row: Mapping[str, Any]
    tokens: list[int]


class _Speaker:
    """A model that continues rows; its weights are read once the first prompt is."""

    def __init__(self, args: argparse.Namespace):
        from subspace_jax.data import text

        self._args = args
        _, self.model, self.tokenizer = language.open_model(args)
        if args.max_new_tokens is None:
            args.max_new_tokens = min(512, self.model.max_length // 2) if args.chat else 64
        self._template = text.load_chat_template(self.tokenizer, _template_of(args)) if args.chat else None
        if args.chat and self._template is None:
            raise ValueError(
                f"--chat: the tokenizer of {args.model} has no chat template; expected --chat-template FILE"
            )
        vocab_size = self.model.vocab_size
        if beyond := [token for token in self.model.eos_tokens if token >= vocab_size]:
            log.warning("no text ends with the tokens %s, of which the model has no row", beyond)
        turn = self._template.end_tokens(self.tokenizer) if self._template else ()
        self._ends = tuple(dict.fromkeys(t for t in (*self.model.eos_tokens, *turn) if t < vocab_size))
        self._params = None
        self.room = self.model.max_length - args.max_new_tokens

    def encode(self, row: Mapping[str, Any], where: str) -> _Encoded:
        """Returns the tokens of a row's prompt; raises where there are none, or too many."""
        if self._template:
            tokens = self.tokenizer.encode(self._rendered(row, where))
        else:
            start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
            tokens = start + self.tokenizer.encode(row["prompt"])
        if not tokens:
            raise ValueError(f"{where}: expected some text, got none")
        if len(tokens) > self.room:
            raise _TooLongError(
                f"{where} and --max-new-tokens: {len(tokens)} tokens and max_new_tokens = "
                f"{self._args.max_new_tokens} exceed the model's {self.model.max_length} positions"
            )
        return _Encoded(row, tokens)

    def load(self) -> None:
        """Reads the weights, unless they have been."""
        from subspace_jax import language as models

        if self._params is None:
            self.model, self._params = models.load_adapted(self._args.model, self._args.adapter)

    def _rendered(self, row: Mapping[str, Any], where: str) -> str:
        from subspace_jax.data import text

        if "messages" in row or isinstance(row["prompt"], list):
            messages, tools, *_ = text.conversation_of(row, where, ["messages" if "messages" in row else "prompt"])
        else:
            messages, tools = ({"role": "user", "content": row["prompt"]},), None
        if self._args.system and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": self._args.system}, *messages)
        if len(messages) > 1 and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        try:
            return self._template.render(messages, tools=tools, add_generation_prompt=True)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def say(self, encoded: _Encoded, number: int) -> str:
        """Prints the continuation of one prompt as it comes, and returns it."""
        from subspace_jax import nn
        from subspace_jax.data import text

        tokens, options = self._prepared([encoded.tokens], number)
        new = (int(token[0]) for token in nn.stream(self.model, self._params, tokens, **options))
        pieces = []
        for piece in text.stream_continuation(self.tokenizer, encoded.tokens, new):
            pieces.append(piece)
            print(piece, end="", flush=True)
        print()
        return "".join(pieces)

    def answers(self, batch: Sequence[_Encoded], number: int) -> Iterator[dict[str, Any]]:
        """Yields the rows of a batch with what is generated."""
        import numpy as np

        from subspace_jax import nn
        from subspace_jax.data import text

        tokens, options = self._prepared([encoded.tokens for encoded in batch], number, self._args.batch_size)
        new = nn.generate(self.model, self._params, tokens, **options)
        for encoded, own, length in zip(batch, np.asarray(new.tokens), np.asarray(new.lengths), strict=False):
            own = own[:length]
            generated = text.decode_continuation(self.tokenizer, encoded.tokens, own)
            reason = "stop" if own[-1] in self._ends else "length"
            yield {**encoded.row, "generated": generated, "finish_reason": reason}

    def _prepared(self, prompts: Sequence[list[int]], number: int, rows: int = 1):
        """Returns prompts padded in front, by rows up to a number of them, and the options of generation."""
        import jax
        import numpy as np

        self.load()
        longest = max(len(prompt) for prompt in prompts)
        length = min(-(-longest // _MULTIPLE) * _MULTIPLE, self.room)
        tokens = np.full((rows, length), self.tokenizer.pad_id, np.int32)
        mask = np.zeros((rows, length), bool)
        mask[:, -1] = True  # a prompt of padding has a token too
        for row, prompt in enumerate(prompts):
            tokens[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, True
        return jax.numpy.asarray(tokens), {
            "attention_mask": jax.numpy.asarray(mask),
            "max_new_tokens": self._args.max_new_tokens,
            "key": jax.random.fold_in(jax.random.key(self._args.seed), number),
            "temperature": self._args.temperature,
            "top_p": self._args.top_p,
            "eos_tokens": self._ends,
        }


def _talk(speaker: _Speaker) -> None:
    """Answers lines of the standard input, each with the conversation so far, to its end."""
    messages, number = [], 0
    asks = sys.stdin.isatty()
    if asks:
        print("A conversation; Ctrl-D ends it.")
    while True:
        try:
            said = input("> " if asks else "")
        except EOFError:
            break
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        encoded = _fitting(speaker, messages)
        if encoded is not None:
            messages.append({"role": "assistant", "content": speaker.say(encoded, number)})
            number += 1
    if asks:
        print()


def _fitting(speaker: _Speaker, messages: list[dict[str, str]]) -> _Encoded | None:
    """Leaves out the oldest turns of a conversation until it fits, and a last one that does not fit at all."""
    while True:
        try:
            return speaker.encode({"messages": messages}, "message")
        except _TooLongError as error:
            if len(messages) == 1:
                print(error, file=sys.stderr)
                messages.clear()
                return None
            log.warning("the conversation is too long; its oldest turn is left out")
            del messages[:2]


def _answer_file(args: argparse.Namespace, speaker: _Speaker) -> None:
    from tqdm import tqdm

    prompts = [speaker.encode(row, where) for where, row in _rows(args)]
    out = open(args.out, "x", encoding="utf-8") if args.out else sys.stdout  # noqa: SIM115 - it may be stdout
    try:
        with tqdm(total=len(prompts), unit="prompt", disable=None if args.out else True) as progress:
            for number, start in enumerate(range(0, len(prompts), args.batch_size)):
                batch = prompts[start : start + args.batch_size]
                for row in speaker.answers(batch, number):
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
                out.flush()
                progress.update(len(batch))
    finally:
        if args.out:
            out.close()
    if args.out:
        print(f"Wrote {len(prompts)} rows to {Path(args.out).resolve()}")


def _rows(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields file and line, and the row, of each prompt."""
    from subspace_jax.data import text
    from subspace_jax.data.text.records import near_names

    name = "standard input" if args.prompts == "-" else args.prompts
    if args.prompts == "-":
        lines = sys.stdin.buffer.readlines()
    elif Path(name).is_file():
        lines = Path(name).read_bytes().splitlines(keepends=True)
    else:
        raise FileNotFoundError(f"--prompts: no file {name}{near_names(name)}")
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise ValueError(f"--prompts: there is no prompt in {name}")
    if Path(name).suffix.lower() == ".jsonl" or first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
        for where, row in text.json_rows(lines, name):
            _check_row(row, where, args.chat)
            yield where, row
        return
    for number, line in enumerate(lines, start=1):
        try:
            said = line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}, line {number}: expected UTF-8 ({error.reason})") from error
        if said.strip():
            yield f"{name}, line {number}", _row_of(said)


def _check_row(row: Mapping[str, Any], where: str, chat: bool) -> None:
    if "messages" in row:
        if not chat:
            raise ValueError(f"{where}: 'messages' need --chat")
    elif not isinstance(row.get("prompt"), (str, list) if chat else str):
        found = type(row["prompt"]).__name__ if "prompt" in row else f"the fields {sorted(row)}"
        raise ValueError(f"{where}: expected 'prompt' with a text{', or messages' * chat}, got {found}")


def _row_of(prompt: str) -> dict[str, Any]:
    return {"prompt": prompt}
