"""KV-cache blocks that are set aside for side chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_specplug.errors import ConfigurationError
from vllm_specplug.settings.model import settings_of

DEFAULT_SHARE = 20
"""Without ``scratch_blocks`` in the settings, one in 20 blocks of the KV cache is set aside."""


_KNOWN_SPECS = (FullAttentionSpec, SlidingWindowSpec, MLAAttentionSpec, SlidingWindowMLASpec)
"""Layer types whose cache consists of token blocks only. Subclasses do not count: they may hold more."""


_FROM_HIDDEN_STATES = ("eagle", "eagle3", "mtp", "medusa", "mlp_speculator", "dflash", "dspark")
"""vLLM's drafters that read hidden states of the main chain's tokens, which are wrong if a side chain wins."""


@dataclass(frozen=True)
class Scratch:
    """The blocks that are set aside for forks; the same in the scheduler's process and in every worker.

    Attributes:
        num_rows: most forks of one step.
        blocks_per_row: number of blocks of a fork, by KV-cache group.
        first_block: id of the first scratch block, which is also the number of blocks of the scheduler.
    """

    num_rows: int
    blocks_per_row: tuple[int, ...]
    first_block: int

    @property
    def num_blocks(self) -> int:
        """Number of blocks that are set aside for all forks."""
        return self.num_rows * sum(self.blocks_per_row)

    def blocks_of(self, fork: int) -> list[range]:
        """Block ids of a fork, by KV-cache group. Groups share memory, so that no two of them share an id."""
        start = self.first_block + fork * sum(self.blocks_per_row)
        blocks = []
        for count in self.blocks_per_row:
            blocks.append(range(start, start + count))
            start += count
        return blocks


def why_single(vllm_config: Any, kv_cache_config: KVCacheConfig) -> str:
    """Why the requests of this engine cannot have side chains; "" if they can."""
    config, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative, is_v2 = vllm_config.speculative_config, bool(vllm_config.use_v2_model_runner)
    odd = {type(spec) for group in kv_cache_config.kv_cache_groups for spec in _layer_specs(group)} - {*_KNOWN_SPECS}
    for reason, applies in (
        (f"layers of {', '.join(sorted(spec.__name__ for spec in odd))} hold more than blocks of tokens", odd),
        ("max_num_seqs is 1, and they take rows that no request has", vllm_config.scheduler_config.max_num_seqs == 1),
        ("the model has no KV cache", not kv_cache_config.kv_cache_groups),
        (f"vLLM's {speculative.method} drafts from hidden states", speculative.method in _FROM_HIDDEN_STATES),
        ("Model Runner V2 runs a draft model", is_v2 and speculative.method == "draft_model"),
        ("tensor parallelism is on", is_v2 and parallel.tensor_parallel_size > 1),
        ("micro-batches overlap", bool(getattr(parallel, "enable_dbo", False))),
        ("LoRA adapters are enabled", vllm_config.lora_config is not None),
        ("a KV connector is configured", vllm_config.kv_transfer_config is not None),
        ("the model is an encoder-decoder", config.is_encoder_decoder),
        ("the model takes more than text", config.is_multimodal_model or config.enable_prompt_embeds),
        ("the model's positions have several dimensions", config.uses_mrope),
        ("context parallelism is on", _context_parallel(parallel)),
        ("pipeline parallelism is on", parallel.pipeline_parallel_size > 1),
        ("data parallelism is on", parallel.data_parallel_size > 1),
        ("kv_sharing_fast_prefill is on", vllm_config.cache_config.kv_sharing_fast_prefill),
        # vLLM reads the experts of the main chain's tokens only.
        ("routed experts are returned", getattr(getattr(vllm_config, "aux_output_config", None), "enabled", False)),
    ):
        if applies:
            return reason
    return ""


def _layer_specs(group: Any) -> list[Any]:
    """Specs of the layers of a KV-cache group, which differ if the layers share only their block size."""
    spec = group.kv_cache_spec
    return list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]


def _context_parallel(parallel_config: Any) -> bool:
    return any(
        getattr(parallel_config, name, 1) > 1
        for name in ("decode_context_parallel_size", "prefill_context_parallel_size")
    )


def plan_scratch(vllm_config: Any, kv_cache_config: KVCacheConfig) -> Scratch | None:
    """The blocks to set aside for forks; None if requests have no side chains.

    Args:
        vllm_config: vLLM's configuration, with our settings in it.
        kv_cache_config: that of a worker, which has all blocks.

    Raises:
        ConfigurationError: ``scratch_blocks`` is less than one fork takes.
    """
    settings = settings_of(vllm_config.additional_config)
    if settings is None or settings.num_chains == 1 or vllm_config.speculative_config is None:
        return None
    if why_single(vllm_config, kv_cache_config):
        return None
    num_draft = int(vllm_config.speculative_config.num_speculative_tokens)
    sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
    per_row = tuple(1 + cdiv(num_draft, size) for size in sizes)
    # The scheduler must still be able to run one request of full length; block 0 holds no request.
    longest = sum(cdiv(int(vllm_config.model_config.max_model_len), size) for size in sizes)
    free = max(kv_cache_config.num_blocks - 1 - longest, 0)
    max_num_seqs = int(vllm_config.scheduler_config.max_num_seqs)
    wanted = min((settings.num_chains - 1) * max_num_seqs, max_num_seqs - 1)  # one row is left to the request itself
    given = settings.scratch_blocks
    if given is not None and given < sum(per_row):
        raise ConfigurationError(
            f"speculative_config: scratch_blocks is {given}, and a chain beyond the first takes {sum(per_row)} blocks "
            f"of the KV cache (of {', '.join(map(str, sizes))} tokens, for {num_draft} draft tokens). Give at least "
            "that many, or leave it out."
        )
    bound = max(kv_cache_config.num_blocks // DEFAULT_SHARE, sum(per_row)) if given is None else given
    num_rows = min(wanted, min(bound, free) // sum(per_row))
    if num_rows == 0:
        return None
    scratch = Scratch(num_rows, per_row, 0)
    return Scratch(num_rows, per_row, kv_cache_config.num_blocks - scratch.num_blocks)


def describe_scratch(vllm_config: Any, kv_cache_config: KVCacheConfig, scratch: Scratch | None) -> str:
    """Line for the log: the blocks set aside, or why there are none; "" if ``num_chains`` is 1."""
    settings = settings_of(vllm_config.additional_config)
    if settings is None or settings.num_chains == 1:
        return ""
    if scratch is None:
        reason = why_single(vllm_config, kv_cache_config) or "the KV cache has no blocks to spare"
        return f"every request keeps one chain (num_chains is {settings.num_chains}): {reason}"
    size = sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors) / kv_cache_config.num_blocks
    return (
        f"up to {settings.num_chains} chains a request, {scratch.num_rows} beyond the first in a step; "
        f"{scratch.num_blocks} of {kv_cache_config.num_blocks} KV-cache blocks "
        f"({scratch.num_blocks * size / 2**20:.1f} MiB) are set aside for them"
    )
