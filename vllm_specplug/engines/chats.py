"""Chats as vLLM's chat server makes prompts of them: by its own code, with or without an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_specplug.engines.arguments import TOKENIZER_ARGUMENTS, parsed
from vllm_specplug.engines.environment import require_vllm
from vllm_specplug.errors import ConfigurationError, InputError


def online_renderer(model_config: Any, renderer: Any) -> Any:
    """What vLLM's server makes prompts with, as it is without options of its own.

    Args:
        model_config: the engine's.
        renderer: the engine's.
    """
    from vllm.renderers.online_renderer import OnlineRenderer

    return OnlineRenderer(
        model_config, renderer, request_logger=None, chat_template=None, chat_template_content_format="auto"
    )


def request_of(body: Mapping[str, Any]) -> Any:
    """A request to vLLM's server, checked by it: of a chat if it has messages, else of a completion.

    Raises:
        ValueError: what vLLM says is wrong with it.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    if "messages" not in body:
        return CompletionRequest.model_validate(dict(body))
    request = ChatCompletionRequest.model_validate(dict(body))
    if request.tool_choice == "auto":  # the default beside tools: it needs a parser of outputs, which stay text here
        request.tool_choice = "none"
    return request


async def prompt_of(online: Any, request: Any) -> Any:
    """The prompt that vLLM's server gives its engine for a request.

    Args:
        online: an :func:`online_renderer`.
        request: a :func:`request_of`.

    Raises:
        ValueError: what vLLM's server answers instead.
    """
    is_chat = hasattr(request, "messages")
    rendered = await (online.render_chat(request) if is_chat else online.render_completion(request))
    if not isinstance(rendered, tuple | list):
        raise ValueError(rendered.error.message)
    prompts = rendered[1] if is_chat else rendered
    if len(prompts) != 1:
        raise ValueError(f"a request has one prompt here, not {len(prompts)}")
    return prompts[0]


def sampling_of(request: Any, max_tokens: int) -> Any:
    """Sampling parameters that vLLM's server makes of a request.

    Args:
        max_tokens: if the request does not say it.
    """
    asked = getattr(request, "max_completion_tokens", None) or request.max_tokens
    return request.to_sampling_params(asked or max_tokens, {})


@dataclass(frozen=True)
class ChatTemplate:
    """Makes text of whole chats with the template of a model; loads vLLM at the first one.

    Attributes:
        model: folder or name of the model, with its configuration.
        trust_remote_code: run code that comes with it.
        options: of ``vllm serve``, which may name another tokenizer.
    """

    model: str
    trust_remote_code: bool = False
    options: tuple[str, ...] = ()

    def __call__(self, messages: Sequence[Mapping[str, Any]], begins_answer: bool = False) -> str:
        """Text of a chat.

        Args:
            begins_answer: put the beginning of the next answer behind it, as a prompt has it.

        Raises:
            InputError: vLLM or the template refuses the chat; the reason.
        """
        renderer = self._renderer
        try:
            request = request_of({"messages": list(messages), "add_generation_prompt": begins_answer})
            params = request.build_chat_params(None, "auto").with_defaults({"tools": None, "tokenize": False})
            _, prompt = renderer.render_messages(request.messages, params)
        except Exception as error:  # templates raise anything
            raise InputError(f"holds a chat that vLLM refuses: {reason(error)}") from error
        if not isinstance(prompt.get("prompt"), str):
            raise InputError("holds a chat, and this model's template makes no text of it")
        return str(prompt["prompt"])

    @cached_property
    def _renderer(self) -> Any:
        require_vllm()
        from vllm.config import ModelConfig, VllmConfig
        from vllm.renderers import renderer_from_config

        try:
            given: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
            if self.options:
                named, _ = parsed(["--model", self.model, *self.options])
                given = {name: getattr(named, name) for name in TOKENIZER_ARGUMENTS}
            config = ModelConfig(model=self.model, **given)
            return renderer_from_config(VllmConfig(model_config=config))
        except Exception as error:
            raise ConfigurationError(
                f"chats go through the template of {self.model!r} by vLLM, which must be a model's folder or name: "
                f"{reason(error)}"
            ) from error


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return "; ".join(dict.fromkeys(each["msg"] for each in error.errors()[:3]))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
