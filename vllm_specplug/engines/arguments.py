"""Engine arguments in the form that vLLM's command line gives them."""

from __future__ import annotations

from typing import Any, NoReturn


def with_cli_arguments(engine_args: dict[str, Any]) -> dict[str, Any]:
    """Replace the key ``cli``, a list of options of ``vllm serve``, by the arguments that vLLM's parser reads there.

    Raises:
        ValueError: vLLM refuses an option, or ``engine_args`` has that argument itself.
    """
    options = engine_args.pop("cli", None)
    if options is None:
        return engine_args
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    parser = EngineArgs.add_cli_args(Parser())
    parsed = parser.parse_args(options)
    for name in engine_args:
        if getattr(parsed, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} must be left out: this command decides it")
    return {**vars(EngineArgs.from_cli_args(parsed)), **engine_args}
