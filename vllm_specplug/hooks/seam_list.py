"""Every name of vLLM that this plugin wraps or relies on, with its signature and the reason for it."""

from __future__ import annotations

from vllm_specplug.hooks.seams import Seam

PROCESS_SEAMS = (
    Seam(
        "vllm.engine.arg_utils",
        "EngineArgs.create_speculative_config",
        ("self", "target_model_config", "target_parallel_config"),
        "takes our keys out of speculative_config, validates them, and hands vLLM a custom_class drafter",
    ),
    Seam(
        "vllm.engine.arg_utils",
        "EngineArgs.create_engine_config",
        ("self",),
        "knows the model runner: afterwards we refuse what our verifier cannot serve on it, before a model loads",
    ),
    Seam(
        "vllm.config.vllm",
        "VllmConfig.__post_init__",
        ("self",),
        "allows async scheduling for a list of methods, NgramGPUTypes: on V2 our method is in the list during the call",
    ),
    Seam(
        "vllm.config.vllm",
        "VllmConfig._get_v2_model_runner_unsupported_features",
        ("self",),
        "lists custom_class as unsupported on V2: it is removed from the list if the class is ours",
    ),
    Seam(
        "vllm.v1.worker.worker_base",
        "WorkerWrapperBase.init_device",
        ("self",),
        "builds the worker's model runner: before that, wraps the runner's seams if the engine has our settings",
    ),
    Seam(
        "vllm.sampling_params",
        "SamplingParams._validate_spec_decode",
        ("self", "speculative_config"),
        "min_p and logit_bias work under a coupled verifier; checks the specplug_... options of a request",
    ),
    Seam(
        "vllm.triton_utils.dispatcher",
        "_rebind_kernels",
        ("overrides",),
        "scans every loaded module and crashes on llvmlite's (vLLM 0.32): importing numba first kills the worker",
        optional=True,
    ),
)
"""Wrapped in every process, by the plugin's entry point."""


METRICS_SEAMS = (
    Seam(
        "prometheus_client.multiprocess",
        "MultiProcessCollector.collect",
        ("self",),
        "with several API servers every answer of /metrics has a registry of its own with this collector in it",
    ),
)
"""Wrapped in a process that reads our configuration; if it fails, only our series are missing from /metrics."""


SCHEDULER_SEAMS = (
    Seam(
        "vllm.v1.engine.core",
        "EngineCore._initialize_kv_caches",
        ("self", "vllm_config"),
        "sizes an engine's KV cache: tells the next seam which engine that is",
    ),
    Seam(
        "vllm.v1.engine.core",
        "generate_scheduler_kv_cache_config",
        ("kv_cache_configs",),
        "gives the scheduler fewer blocks than the workers have: the others are scratch for forks",
    ),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._handle_stopped_request",
        ("self", "request"),
        "counts drafts behind a stop token as computed: a streaming-input session would keep them in its prompt",
    ),
)
"""Wrapped in the process that schedules, before it sizes its KV cache. The first two are idle unless ``num_chains`` is
above 1, the last is idle for requests that are no streaming-input sessions."""


SERVER_USED = (
    Seam(
        "vllm.entrypoints.serve.middleware.authenticate",
        "AuthenticationMiddleware.verify_token",
        ("self", "headers"),
        "vLLM's check of a server's keys, which guards vLLM's own paths only: called for our endpoint",
    ),
)
"""Called in a server whose ``VLLM_PLUGINS`` names our endpoint, if the server has keys."""


V1_SEAMS = (
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.initialize_kv_cache",
        ("self", "kv_cache_config"),
        "last moment before serving: gives the drafter its runner and the runner its verifier",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._bookkeeping_sync",
        ("self", "scheduler_output", "sampler_output"),
        "rewinds generators of half-prefilled requests, which a CPU generator cannot; our verifier draws nothing there",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._on_request_state_removed",
        ("self", "req_id", "req_state"),
        "a request has finished or is aborted: frees the state of drafter and verifier for it",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._update_streaming_request",
        ("self", "req_id", "new_req_data"),
        "a streaming-input session goes on with another prompt and other parameters: drafting begins anew",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.take_draft_token_ids",
        ("self",),
        "returns the drafts of vLLM's own drafter: ours join them",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._calc_spec_decode_metadata",
        ("self", "num_draft_tokens", "cu_num_scheduled_tokens"),
        "on the CPU, a step without drafts reuses a layout, which saves 0.1 ms of a 3 ms step",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._prepare_inputs",
        ("self", "scheduler_output", "num_scheduled_tokens"),
        "puts the forks' batch rows behind those of the requests",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._determine_batch_execution_and_padding",
        ("self", "num_tokens", "num_reqs", "num_scheduled_tokens_np", "max_num_scheduled_tokens"),
        "counts rows and tokens of forks too",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._get_slot_mappings",
        ("self", "num_tokens_padded", "num_reqs_padded", "num_tokens_unpadded"),
        "keeps the KV-cache slots of forks, which vLLM would take for padding",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._build_attention_metadata",
        ("self", "num_tokens", "num_reqs", "max_query_len"),
        "shows the forks to attention, but not to vLLM's own drafter",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._preprocess",
        ("self", "scheduler_output", "num_input_tokens"),
        "zeroes positions behind the scheduled tokens: those of forks are kept",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._prepare_padding_mask",
        ("self", "num_tokens_unpadded", "num_tokens_padded"),
        "tokens of forks are not padding",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "build_logitsprocs",
        ("vllm_config", "device", "is_pin_memory", "is_pooling_model", "custom_logitsprocs"),
        "drops min_p, logit_bias and custom processors under speculation; a coupled verifier serves them all",
    ),
    Seam(
        "vllm.v1.sample.rejection_sampler",
        "expand_batch_to_tokens",
        ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
        "returns uninitialised memory on the CPU of vLLM 0.32; repeats the values instead",
    ),
)
"""Wrapped in a worker that is about to build a V1 model runner with our settings."""


V2_SEAMS = (
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "init_speculator",
        ("vllm_config", "device", "req_states"),
        "builds our drafter; makes a sampling drafter of vLLM's share the target's noise",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "RejectionSampler",
        ("sampler", "spec_config", "device", "watermark_key"),
        "builds our verifier, a subclass, if the sampler is a coupling",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.load_model",
        ("self", "load_dummy_weights"),
        "afterwards the runner has its verifier: connects it with the drafter and logs what is active",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.add_requests",
        ("self", "scheduler_output"),
        "new and resumed requests: their tokens so far and their options, for the drafter's copy on the host",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.finish_requests",
        ("self", "scheduler_output"),
        "requests that finished, were aborted or preempted: frees the drafter's state for them",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.prepare_inputs",
        ("self", "scheduler_output"),
        "reads the drafts: puts them in place before that, as late as possible, since the device works meanwhile",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.initialize_kv_cache",
        ("self", "kv_cache_config", "is_profiling"),
        "makes the KV cache: afterwards prepares for forks, which need blocks of it",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.execute_model",
        ("self", "scheduler_output"),
        "copies the scheduler's output, to which forks are added under made-up request ids",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.update_requests",
        ("self", "scheduler_output"),
        "afterwards every request of the step has its blocks: plans the forks",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.gather_batch_req_state",
        ("self", "scheduler_output", "dummy_run"),
        "gives the forks' made-up request ids the state of their requests, and puts their rows last",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.prepare_attn",
        ("self", "input_batch"),
        "gives forks their block tables and KV-cache slots",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.sample",
        ("self", "hidden_states", "input_batch", "grammar_output"),
        "copies the winning chains home, and removes the forks from batch and output",
    ),
    Seam(
        "vllm.v1.worker.gpu.spec_decode.utils",
        "DraftTokensHandler.get_draft_tokens",
        ("self",),
        "reports drafts to the scheduler: without async scheduling they are cut to their real lengths",
    ),
)
"""Wrapped in a worker that is about to build a V2 model runner with our settings."""


V1_USED = (
    Seam(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionBackendImpl.do_kv_cache_update",
        ("self", "layer", "key", "value", "kv_cache", "slot_mapping"),
        "replaced on the layers of a runner with forks: keys and values of shared heads are written for each fork",
    ),
    Seam(
        "vllm.v1.core.sched.utils",
        "check_sequence_repetition",
        ("token_ids", "params"),
        "ends a request that repeats itself: called so that the worker ends it at the same token",
    ),
    Seam(
        "vllm.v1.worker.utils",
        "copy_kv_cache_blocks_inplace",
        ("kv_caches", "num_blocks", "kv_cache_block_copies"),
        "copies first blocks for forks, and the winning chains' keys and values home",
    ),
    Seam(
        "vllm.v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer._sample_from_logits",
        ("self", "logits", "sampling_metadata"),
        "replaced on a sampling drafter, so that it draws with the target's noise",
    ),
)
"""Not wrapped, but replaced on single objects or called; we rely on their signatures."""


V2_USED = (
    Seam(
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler",
        "RejectionSampler._verify",
        (
            "self", "logits", "draft_logits", "draft_sampled", "pos", "cu_num_logits", "idx_mapping", "idx_mapping_np",
            "expanded_idx_mapping", "expanded_local_pos", "seq_lens_upper_bound_np", "verify_draft_sampled",
        ),
        "the one method that our verifier overrides",
    ),
    Seam(
        "vllm.v1.worker.gpu.spec_decode.speculator",
        "BaseSpeculator.propose",
        (
            "self", "input_batch", "attn_metadata", "slot_mappings", "last_hidden_states", "aux_hidden_states",
            "num_sampled", "num_rejected", "last_sampled", "next_prefill_tokens", "temperature", "seeds",
            "dp_sync_state", "dummy_run", "skip_attn_for_dummy_run", "mm_inputs", "is_profile",
            "num_speculative_tokens",
        ),
        "our drafter implements it, and the runner calls it",
    ),
    Seam(
        "vllm.v1.worker.gpu.spec_decode.speculator",
        "DraftModelSpeculator.sample_draft",
        (
            "self", "hidden_states", "sample_src_positions", "idx_mapping", "temperature", "seeds", "draft_step",
            "draft_logits", "spec_step_idx",
        ),
        "replaced on a sampling drafter, so that it draws with the target's noise",
    ),
    Seam(
        "vllm.v1.worker.gpu.sample.gumbel",
        "gumbel_sample",
        ("logits", "expanded_idx_mapping", "temperature", "seed", "pos", "apply_temperature", "is_drafting"),
        "vLLM's own draw, which our verifier calls",
    ),
    Seam(
        "vllm.v1.worker.gpu.sample.sampler",
        "Sampler.apply_sampling_params",
        (
            "self", "logits", "expanded_idx_mapping", "idx_mapping", "idx_mapping_np", "pos", "input_ids",
            "expanded_local_pos", "seq_lens_upper_bound_np",
        ),
        "vLLM's own processing of logits, which our verifier calls",
    ),
    Seam(
        "vllm.v1.worker.gpu.sample.sampler",
        "Sampler.sample",
        (
            "self", "logits", "expanded_idx_mapping", "idx_mapping", "idx_mapping_np", "pos", "input_ids",
            "expanded_local_pos", "seq_lens_upper_bound_np", "return_logprobs",
        ),
        "replaced on the runner's sampler if tokens are drawn by MinHash",
    ),
    Seam(
        "vllm.v1.worker.gpu.cudagraph_utils",
        "CudaGraphManager.dispatch",
        ("self", "num_reqs", "num_tokens", "uniform_token_count", "num_active_loras", "max_query_len"),
        "called to limit forks to what keeps the batch's CUDA graph",
    ),
)  # fmt: skip
"""Not wrapped, but overridden, replaced on single objects or called; we rely on their signatures."""


AUDIT_V1_USED = (
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._sample",
        ("self", "logits", "spec_decode_metadata"),
        "called many times per step on the runner being audited, and replaced to emit what the audit wants",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.take_draft_token_ids",
        ("self",),
        "replaced on the runner being audited: returns the audit's drafts",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._get_spec_decode_draft_probs",
        ("self", "spec_decode_metadata"),
        "called: the probabilities that drafts were drawn from",
    ),
)


AUDIT_V2_USED = (
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.sample",
        ("self", "hidden_states", "input_batch", "grammar_output"),
        "called many times per step on the runner being audited, and replaced to emit what the audit wants",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.take_draft_token_ids",
        ("self",),
        "replaced on the runner being audited: returns the audit's drafts",
    ),
    Seam(
        "vllm.v1.worker.gpu.spec_decode.utils",
        "DraftTokensHandler.set_draft_tokens",
        ("self", "input_batch", "draft_tokens"),
        "replaced on the runner being audited: it stores the drafts of the next step",
    ),
)
"""Replaced or called on single objects by ``specplug audit`` only, like those of ``AUDIT_V1_USED``."""


CHAT_SEAMS = (
    Seam(
        "vllm.renderers.online_renderer",
        "OnlineRenderer.__init__",
        ("self", "model_config", "renderer", "request_logger", "chat_template", "chat_template_content_format"),
        "makes prompts of chats in batch runs, as vLLM's server does with it",
    ),
    Seam(
        "vllm.renderers.online_renderer",
        "OnlineRenderer.render_chat",
        ("self", "request"),
        "the prompt of a chat",
    ),
    Seam(
        "vllm.renderers.online_renderer",
        "OnlineRenderer.render_completion",
        ("self", "request"),
        "the prompt of a completion in a batch file of OpenAI",
    ),
    Seam(
        "vllm.renderers.registry",
        "renderer_from_config",
        ("config",),
        "the renderer of a model without an engine, for chats in token stores",
    ),
    Seam(
        "vllm.renderers.base",
        "BaseRenderer.render_messages",
        ("self", "messages", "params"),
        "the text of a chat, for token stores",
    ),
    Seam(
        "vllm.entrypoints.openai.chat_completion.protocol",
        "ChatCompletionRequest.build_chat_params",
        ("self", "default_template", "default_template_content_format"),
        "how a chat's text is made, for token stores",
    ),
    Seam(
        "vllm.entrypoints.openai.chat_completion.protocol",
        "ChatCompletionRequest.to_sampling_params",
        ("self", "max_tokens", "default_sampling_params"),
        "sampling of a chat in a batch file of OpenAI",
    ),
    Seam(
        "vllm.entrypoints.openai.completion.protocol",
        "CompletionRequest.to_sampling_params",
        ("self", "max_tokens", "default_sampling_params"),
        "sampling of a completion in a batch file of OpenAI",
    ),
    Seam(
        "vllm.tokenizers",
        "get_tokenizer",
        ("tokenizer_name",),
        "the tokenizer that an engine with these options loads, for the measuring commands",
    ),
)
"""Called by ``engines/chats.py`` and ``measure/prompts.py``, where a missing one costs a row or ends the command."""
