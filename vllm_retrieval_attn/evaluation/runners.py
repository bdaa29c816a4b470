# SPDX-License-Identifier: Apache-2.0
"""What answers the questions of evaluation/evaluate.py and scores its texts: an engine in this process, or a server.

Prose is scored through decode steps, since only these use an index: the first tokens of a passage are the prompt, the
following ones are forced upon the sampler one by one, and vLLM reports the distribution from before the forcing.
Model runner V2 (CUDA) does this itself (``enable_trace_replay``); V1 (CPU without Triton) does it with
:class:`ForceTokens`. The token that the prompt's own pass predicts is not counted.
"""

import gc
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from vllm_retrieval_attn.bench.engine import InProcessEngine
from vllm_retrieval_attn.evaluation.tasks import Passage, Task

MODES = ("full", "none", "flat", "attention")
FULL = "full"
_WHOLE_VOCABULARY = 65_536
"""Up to so many tokens KL is over the whole vocabulary; beyond, over the most likely ``_TOP`` and the rest as one."""
_TOP = 1024
_FORCED = "force_tokens"
"""Key of the forced tokens in ``SamplingParams.extra_args``."""


@dataclass(frozen=True)
class Scores:
    """Distributions at the S scored tokens of a passage; in 32 bits, since full attention's are kept.

    Attributes:
        ids, logprobs: (S, K) tokens and their log-probabilities; K is the vocabulary if ``whole``.
        true: (S,) log-probabilities of the text's own tokens.
    """

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    true: npt.NDArray[np.float64]
    whole: bool


class Runner(Protocol):
    """What answers: an engine in this process or a server."""

    limit: int
    """Most tokens of a request."""
    rows_read: list[int]
    """Of each request that searched: host rows that a decode step read for a KV head, on average."""

    def encode(self, text: str, special: bool = False) -> list[int]: ...
    def answer(self, task: Task) -> str: ...
    def score(self, passage: Passage) -> Scores | None:
        """None from what can not be given the tokens of a text through decode steps."""

    def close(self) -> None: ...


class ForceTokens(LogitsProcessor):
    """Leaves one token a step to requests that carry a list of them, on model runner V1."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._rows, batch_update, self._state)

    @staticmethod
    def _state(params: Any, prompt: list[int] | None, output: list[int]) -> tuple[list[int], list[int]] | None:
        forced = (params.extra_args or {}).get(_FORCED)
        return None if forced is None else (forced, output)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (forced, output) in self._rows.items():
            if len(output) < len(forced):
                logits[row] = -torch.inf
                logits[row, forced[len(output)]] = 0.0
        return logits


def _uses_runner_v2() -> bool:
    """As ``VllmConfig.use_v2_model_runner`` decides; needed before there is a config."""
    import vllm.envs
    from vllm.triton_utils import HAS_TRITON

    wanted = vllm.envs.VLLM_USE_V2_MODEL_RUNNER
    return bool(HAS_TRITON) if wanted is None else bool(wanted)


def _small_cpu_cache(model: str, limit: int, options: dict[str, Any]) -> dict[str, int]:
    """Room for the requests of this module, where vLLM would fill nearly all of the RAM with pages."""
    from vllm_retrieval_attn.core.config import GB
    from vllm_retrieval_attn.doctor.sizing import model_shape

    if "gpu_memory_utilization" in options or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return {}
    # Four times one request in the model's own dtype: two requests, in float32.
    return {"kv_cache_memory_bytes": max(GB, 4 * limit * model_shape(model, 1).bytes_per_token)}


class EngineRunner:
    """An engine in this process.

    Args:
        model: folder or name. mode: one of MODES.
        limit: tokens of the longest request. options: for ``vllm.LLM`` and, under ``retrieval``, our knobs.
    """

    def __init__(self, model: str, mode: str, limit: int, options: dict[str, Any]) -> None:
        from vllm.platforms import current_platform

        options = dict(options)
        if mode == FULL and current_platform.is_cpu():
            options = {**_small_cpu_cache(model, limit, options), **options}
        knobs = {**options.pop("retrieval", {}), "index": mode}
        own = "CPU_ATTN" if current_platform.is_cpu() else "FLASH_ATTN"
        forcing = {"enable_trace_replay": True} if _uses_runner_v2() else {"logits_processors": [ForceTokens]}
        self._cpus = os.sched_getaffinity(0)
        self._engine: InProcessEngine | None = InProcessEngine(
            model,
            None if mode == FULL else knobs,
            own if mode == FULL else "retrieval",
            **{
                "max_model_len": limit,
                "max_num_seqs": 2,
                "enable_prefix_caching": False,
                "max_logprobs": -1,
                "use_tqdm_on_load": False,
                "seed": 0,
                **forcing,
                **options,
            },
        )
        config = self._engine.engine.vllm_config
        self.limit = int(config.model_config.max_model_len)
        self.rows_read: list[int] = []
        self._v2 = bool(config.use_v2_model_runner)
        self._vocabulary = int(config.model_config.get_vocab_size())
        self._tokenizer: Any = self._engine.llm.get_tokenizer()

    def encode(self, text: str, special: bool = False) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def answer(self, task: Task) -> str:
        assert self._engine is not None
        (answer,) = self._engine.run([task.prompt], temperature=0, max_tokens=task.max_tokens)
        if answer.finish not in ("stop", "length"):
            raise RuntimeError(f"retrieval: a request ended with {answer.finish!r}; the log above says why")
        self._told(answer.retrieval)
        return answer.text

    def _told(self, report: dict[str, Any] | None) -> None:
        if report and report["rows_read"]:
            self.rows_read.append(int(report["rows_read"]))

    def score(self, passage: Passage) -> Scores:
        from vllm.sampling_params import RequestOutputKind

        assert self._engine is not None
        tokens = passage.tokens
        whole = self._vocabulary <= _WHOLE_VOCABULARY
        self._engine.add(
            passage.prompt,
            temperature=0,
            max_tokens=len(tokens),
            ignore_eos=True,
            detokenize=False,
            logprobs=-1 if whole else _TOP,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **({"trace_decode_token_ids": tokens} if self._v2 else {"extra_args": {_FORCED: tokens}}),
        )
        (output,) = [output for outputs in self._engine.steps() for output in outputs]
        self._engine.drain()
        found = output.outputs[0]
        self._told((output.kv_transfer_params or {}).get("retrieval"))
        if list(found.token_ids) != tokens:
            raise RuntimeError(
                f"retrieval: {len(found.token_ids)} of {len(tokens)} tokens of the text were decoded, not all as given"
            )
        # Each row holds the forced token, then the most likely ones. The first row is the prompt's own.
        ids = np.array(found.logprobs.token_ids, np.int32).reshape(len(tokens), -1)[1:, 1:]
        logprobs = np.array(found.logprobs.logprobs, np.float32).reshape(len(tokens), -1)[1:]
        return Scores(ids, logprobs[:, 1:], logprobs[:, 0].astype(np.float64), whole)

    def close(self) -> None:
        """End the engine and give back what it held, so that the next one finds the device free."""
        from vllm.distributed import cleanup_dist_env_and_memory

        if self._engine is not None:
            self._engine.close()
        self._engine = None
        gc.collect()
        cleanup_dist_env_and_memory()
        os.sched_setaffinity(0, self._cpus)  # vLLM's CPU worker has bound this thread to fewer


class ServerRunner:
    """A vLLM server, through its OpenAI API and ``/tokenize``.

    Args:
        url: as ``http://host:port``. model: served name; None takes the server's first.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        import openai

        self._url = url.rstrip("/").removesuffix("/v1")
        self._client = openai.OpenAI(
            base_url=f"{self._url}/v1",
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=3600,  # a long prompt on a small machine
            max_retries=0,
        )
        try:
            self._model = model or self._client.models.list().data[0].id
        except openai.OpenAIError as error:
            raise ValueError(f"retrieval: {self._url} does not name its models: {error}") from None
        self.limit = int(self._tokenize("a")["max_model_len"])
        self.rows_read: list[int] = []

    def _tokenize(self, text: str, special: bool = False) -> dict[str, Any]:
        body = json.dumps({"model": self._model, "prompt": text, "add_special_tokens": special}).encode()
        request = urllib.request.Request(f"{self._url}/tokenize", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                return dict(json.load(reply))
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise ValueError(
                f"retrieval: {self._url}/tokenize does not answer for model {self._model!r}: {error}"
            ) from None

    def encode(self, text: str, special: bool = False) -> list[int]:
        return list(self._tokenize(text, special)["tokens"])

    def answer(self, task: Task) -> str:
        import openai

        try:
            reply = self._client.completions.create(
                model=self._model, prompt=task.prompt, max_tokens=task.max_tokens, temperature=0
            )
        except openai.OpenAIError as error:
            raise RuntimeError(f"retrieval: {self._url} did not answer: {error}") from None
        report = ((reply.model_extra or {}).get("kv_transfer_params") or {}).get("retrieval")
        if report and report["rows_read"]:
            self.rows_read.append(int(report["rows_read"]))
        return reply.choices[0].text

    def score(self, passage: Passage) -> None:
        """Nothing: vLLM's API takes no tokens for decode steps."""

    def close(self) -> None:
        self._client.close()


Starts = Sequence[tuple[str, Callable[[], Runner]]]
"""Mode names with what starts each; ``full``, if there, is the first."""


def engines(model: str, modes: Sequence[str], lengths: Sequence[int], options: dict[str, Any]) -> Starts:
    """Engines of the modes, after that of full attention, which the others are compared with."""
    ordered = [FULL, *(mode for mode in dict.fromkeys(modes) if mode != FULL)]
    return [(mode, partial(EngineRunner, model, mode, max(lengths), options)) for mode in ordered]


def servers(url: str, model: str | None, name: str, full_url: str | None) -> Starts:
    """A running server, after one with full attention if ``full_url`` names it."""
    starts: list[tuple[str, Callable[[], Runner]]] = [(name, partial(ServerRunner, url, model))]
    if full_url is not None:
        starts.insert(0, (FULL, partial(ServerRunner, full_url)))
    return starts
