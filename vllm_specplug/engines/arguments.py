"""Engine arguments in the form that vLLM's command line gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

TOKENIZER_ARGUMENTS = ("tokenizer", "tokenizer_mode", "revision", "tokenizer_revision", "trust_remote_code")
"""Arguments of vLLM's engine that decide which tokenizer it loads."""


def parsed(options: Sequence[str]) -> tuple[Any, Any]:
    """Options of ``vllm serve`` as vLLM's own parser reads them, and that parser.

    Raises:
        ValueError: vLLM refuses an option.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    parser = EngineArgs.add_cli_args(Parser())
    return parser.parse_args(list(options)), parser


def with_cli_arguments(engine_args: dict[str, Any]) -> dict[str, Any]:
    """Replace the key ``cli``, a list of options of ``vllm serve``, by the arguments that vLLM's parser reads there.

    Raises:
        ValueError: vLLM refuses an option, or ``engine_args`` has that argument itself.
    """
    options = engine_args.pop("cli", None)
    if options is None:
        return engine_args
    from vllm.engine.arg_utils import EngineArgs

    given, parser = parsed(options)
    for name in engine_args:
        if getattr(given, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} must be left out: this command decides it")
    return {**vars(EngineArgs.from_cli_args(given)), **engine_args}
