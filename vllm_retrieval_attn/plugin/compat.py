# SPDX-License-Identifier: Apache-2.0
"""Every touch of vLLM that is not a public hook. Written for vLLM 0.32 and 0.33.

Each patch names its reason and what would remove it. They are installed once per process by
:func:`install`, those of the model runner by :func:`patch_runner` in a worker that serves with our
backend, and do nothing unless the backend is selected.
"""

import copyreg
import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm_retrieval_attn.plugin.resolved import CONNECTOR, find_resolved_config

NAME = "RETRIEVAL"
BACKEND_PATH = "vllm_retrieval_attn.plugin.backend.RetrievalBackend"
CONNECTOR_MODULE = "vllm_retrieval_attn.plugin.connector"

GRAPHS_KEY = "retrieval_graphs"
"""Key of the connector's extra config: decode steps may be replayed as whole graphs."""

END_GRACE_S = 15.0
"""Seconds to end for an engine that vLLM would kill at once."""

_MARK = "_retrieval_wrapped"

_sessions_arrive = False
"""Whether a streaming-input session came to an engine of ours in this process."""


def wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace ``owner.name`` by ``make(original)``, once."""
    original = getattr(owner, name)
    if getattr(original, _MARK, False):
        return
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, _MARK, True)
    setattr(owner, name, replacement)


def _restore_backend(name: str) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    _register_name()
    return AttentionBackendEnum[name]


def _register_name() -> None:
    """The backend's name. Its class is imported only when a layer asks for it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, BACKEND_PATH)
    # Enum members pickle by value, and a spawned EngineCore unpickles its config before plugins load:
    # "... is not a valid AttentionBackendEnum". Restoring by name registers first.
    # Remove when vLLM pickles AttentionBackendEnum by name, or loads plugins before unpickling.
    copyreg.pickle(AttentionBackendEnum, lambda member: (_restore_backend, (member.name,)))


def _register_spec() -> None:
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_retrieval_attn.plugin.manager import RetrievalManager
    from vllm_retrieval_attn.plugin.spec import RetrievalSpec

    # The registry fills itself only while it is empty; ours first would hide vLLM's own specs.
    # Remove when _ensure_registered tells "empty" from "built-ins missing".
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(RetrievalSpec, RetrievalManager, uniform_type_base_spec=RetrievalSpec)


def _patch_cpu_selection() -> None:
    """CpuPlatform ignores a selected backend that is not its own.

    Remove when CpuPlatform.get_attn_backend_cls returns the path of a registered custom backend.
    """
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    original: Any = CpuPlatform.__dict__["get_attn_backend_cls"].__func__
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def get_attn_backend_cls(cls: Any, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        if selected_backend is AttentionBackendEnum[NAME]:
            return selected_backend.get_path()
        return original(cls, selected_backend, *args, **kwargs)

    setattr(get_attn_backend_cls, _MARK, True)
    setattr(CpuPlatform, "get_attn_backend_cls", classmethod(get_attn_backend_cls))  # noqa: B010  # mypy refuses the assignment


def _patch_kernel_scan() -> None:
    """vLLM's CPU start reads ``__dict__`` of everything in every module, and llvmlite answers with a C symbol.

    llvmlite's library wrapper looks any unknown name up in its shared library, finds one for ``__dict__``, and the
    scan ends with "'_lib_fn_wrapper' object has no attribute 'get'" once Numba is loaded in the process, as ours is.
    Remove when ``_rebind_kernels`` skips values whose ``__dict__`` is no dictionary.
    """
    from vllm.triton_utils import dispatcher

    def make(original: Any) -> Any:
        def _rebind_kernels(overrides: Any) -> None:
            hidden = {name: module for name, module in sys.modules.items() if name.startswith("llvmlite.")}
            for name in hidden:
                del sys.modules[name]
            try:
                original(overrides)
            finally:
                sys.modules.update(hidden)

        return _rebind_kernels

    if hasattr(dispatcher, "_rebind_kernels"):
        wrap(dispatcher, "_rebind_kernels", make)


def _patch_engine_args() -> None:
    """Selecting the backend turns on what it needs: connector, per-kind backends, piecewise graphs.

    Remove when a backend can contribute to VllmConfig through a hook of its own.
    """
    from vllm.engine.arg_utils import EngineArgs

    def make(original: Any) -> Any:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            from vllm_retrieval_attn.plugin import engine_config

            if not engine_config.selected(self):
                return original(self, *args, **kwargs)
            knobs = engine_config.prepare(self)
            return engine_config.finish(knobs, original(self, *args, **kwargs))

        return create_engine_config

    wrap(EngineArgs, "create_engine_config", make)


def _patch_input_processor() -> None:
    """A request that host memory can never hold is refused where vLLM refuses too long prompts.

    Remove when a KV connector can validate a request at arrival.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    def make(original: Any) -> Any:
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            global _sessions_arrive
            request = original(self, *args, **kwargs)
            config = find_resolved_config(self.vllm_config)
            if config is not None:
                _sessions_arrive = _sessions_arrive or request.resumable
                from vllm_retrieval_attn.plugin.admission import check_request

                check_request(config, request)
            return request

        return process_inputs

    wrap(InputProcessor, "process_inputs", make)


def _serves(scheduler: Any) -> bool:
    """Whether this scheduler's engine has our backend."""
    transfer = scheduler.vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == CONNECTOR


def _patch_scheduler() -> None:
    """Requests whose host attention failed, or that outgrew host memory, end with an error.

    The worker reports the former through the connector's worker metadata, the connector's waiting line names the
    latter. Remove when vLLM fails requests named in KVConnectorOutput.failed_recving whatever their state (it does so
    for those that wait for remote KV), and a connector's scheduler half can name some too.
    """
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import KVConnectorOutput

    from vllm_retrieval_attn.plugin.messages import WorkerReport

    def make_update(original: Any) -> Any:
        def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
            if _serves(self):
                output = model_runner_output.kv_connector_output or KVConnectorOutput()
                report = output.kv_connector_worker_meta
                failed = self.connector.line.take_failed()
                if isinstance(report, WorkerReport):
                    self.connector.log.note(report)  # before requests of this step finish
                    failed |= report.failed
                if failed:
                    output = replace(output, failed_recving=set(output.failed_recving or ()) | failed)
                    model_runner_output = replace(model_runner_output, kv_connector_output=output)
            return original(self, scheduler_output, model_runner_output)

        return update_from_output

    def make_failed(original: Any) -> Any:
        def _handle_failed_recving(self: Any, failed_req_ids: set[str]) -> set[str]:
            affected: set[str] = original(self, failed_req_ids)
            if _serves(self):
                affected = affected | {name for name in failed_req_ids if name in self.requests}
            return affected

        return _handle_failed_recving

    wrap(Scheduler, "update_from_output", make_update)
    wrap(Scheduler, "_handle_failed_recving", make_failed)


def _patch_waiting() -> None:
    """A request whose host pages are not there is passed over; vLLM would look no further in its queue.

    A connector can say so by get_num_new_matched_tokens, but is not asked about sessions that hold KV, nor listened to
    for requests that skip the prefix cache. Remove when it is for all.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_retrieval_attn.plugin.line import Turn

    def give_up_kv(scheduler: Any, request: Any) -> None:
        # What Scheduler._preempt_request does, for a request that does not run.
        scheduler._free_request_blocks(request)
        scheduler.encoder_cache_manager.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        scheduler.reset_preempted_req_ids.add(request.request_id)

    def make(original: Any) -> Any:
        def _handle_blocked_waiting_request(self: Any, request: Any) -> bool:
            ready: bool = original(self, request)
            if not ready or not _serves(self):
                return ready
            turn = self.connector.line.turn(request)
            if turn is Turn.YIELD:
                give_up_kv(self, request)
            return turn is Turn.GO

        return _handle_blocked_waiting_request

    wrap(Scheduler, "_handle_blocked_waiting_request", make)


def _patch_output_processor() -> None:
    """A session that the engine ended with an error is over for its client too.

    vLLM's front end takes any finish reason for the end of a chunk while a session's input is open. Its next chunk
    would begin a new request under the old id, which knows nothing of what came before. Remove when an error ends a
    session there.
    """
    from vllm.v1.engine import FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor

    def make(original: Any) -> Any:
        def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
            ended = []
            for output in engine_core_outputs if _sessions_arrive else ():
                state = self.request_states.get(output.request_id)
                if output.finish_reason is not FinishReason.ERROR or not getattr(state, "streaming_input", False):
                    continue
                ended.append(output.request_id)
                state.streaming_input = False
                if state.queue is not None:
                    state.queue.close()  # ends the task that sends chunks
            processed = original(self, engine_core_outputs, *args, **kwargs)
            processed.reqs_to_abort.extend(ended)  # chunks that were on their way
            return processed

        return process_outputs

    wrap(OutputProcessor, "process_outputs", make)


def _publish_rows_v1(runner: Any, num_reqs: int, dummy: bool) -> None:
    from vllm_retrieval_attn.plugin import row_ids

    row_ids.publish(None if dummy else runner.input_batch.req_ids[:num_reqs])


def _patch_v1_runner() -> None:
    """Model runner V1 (CPU without Triton) does not tell builders which request a row is.

    Remove when CommonAttentionMetadata carries request ids (V2 carries a slot number).
    """
    runner = importlib.import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner

    def make(original: Any) -> Any:
        def _build_attention_metadata(self: Any, num_tokens: int, num_reqs: int, *args: Any, **kwargs: Any) -> Any:
            _publish_rows_v1(self, num_reqs, bool(kwargs.get("for_cudagraph_capture")))
            return original(self, num_tokens, num_reqs, *args, **kwargs)

        return _build_attention_metadata

    wrap(runner, "_build_attention_metadata", make)


def _patch_v2_runner() -> None:
    """The same for model runner V2 (CUDA). Remove as above."""
    state = importlib.import_module("vllm.v1.worker.gpu.model_states.default").DefaultModelState

    def make(original: Any) -> Any:
        def prepare_attn(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            from vllm_retrieval_attn.plugin import row_ids

            row_ids.publish(None if kwargs.get("for_capture") else input_batch.req_ids)
            return original(self, input_batch, *args, **kwargs)

        return prepare_attn

    wrap(state, "prepare_attn", make)


def patch_runner(use_v2: bool) -> None:
    """Patch the model runner of this worker; its module is imported by then."""
    if use_v2:
        _patch_v2_runner()
        from vllm_retrieval_attn.plugin import graphs

        graphs.install()
    else:
        _patch_v1_runner()


def _patch_engine_manager() -> None:
    """A server that ends gives its engine time to let host memory and workers go.

    By default vLLM kills an engine at the moment it asks it to end, except on ROCm, which has the same 15 s. Remove
    when the grace is the same on every platform.
    """
    from vllm.v1.engine.utils import CoreEngineProcManager

    def make_init(original: Any) -> Any:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            configs = [part for part in (*args, *kwargs.values()) if hasattr(part, "kv_transfer_config")]
            self._retrieval = any(find_resolved_config(config) is not None for config in configs)
            original(self, *args, **kwargs)

        return __init__

    def make_shutdown(original: Any) -> Any:
        def shutdown(self: Any, timeout: float | None = None) -> None:
            if not getattr(self, "_retrieval", False):
                original(self, timeout)
                return
            # Requests had no time to end, so this is not what is left of it; see get_engine_process_shutdown_timeout.
            at_once = timeout == 0 and self._request_shutdown_timeout == 0
            original(self, END_GRACE_S if at_once else timeout)

        return shutdown

    wrap(CoreEngineProcManager, "__init__", make_init)
    wrap(CoreEngineProcManager, "shutdown", make_shutdown)


def _patch_excepthook() -> None:
    """What we refuse ends the program with our line alone: above it would stand forty of vLLM's and asyncio's.

    Remove when ``vllm serve`` shows a ValueError about its configuration as one line.
    """

    def make(original: Any) -> Any:
        def excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            line = str(error)
            if issubclass(kind, ValueError) and line.startswith("retrieval: ") and "\n" not in line:
                print(line, file=sys.stderr)
            else:
                original(kind, error, trace)

        return excepthook

    wrap(sys, "excepthook", make)


def install() -> None:
    """Register the backend and install every patch. Safe to call again."""
    _patch_excepthook()
    _register_name()
    _patch_engine_args()
    _register_spec()
    _patch_cpu_selection()
    _patch_kernel_scan()
    _patch_input_processor()
    _patch_scheduler()
    _patch_waiting()
    _patch_output_processor()
    _patch_engine_manager()
