# SPDX-License-Identifier: Apache-2.0
"""Exact attention in place of a transformers model's own, which keeps queries for bench/capture.py."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_retrieval_attn.device.merge import merge_partials

_BLOCK = 1024  # queries that share one mask in a sliding-window layer


def _dense(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention with log-sum-exp by PyTorch's kernels.

    Args:
        query: (1, h, n, d). keys, values: (1, kv_heads, m, d). causal: query i sees keys up to i (n == m).

    Returns:
        (1, h, n, d) in the dtype of the query and (1, h, n) float32 natural log-sum-exp.
    """
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, causal, scale=scale
        )
        return out, lse
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    if query.dtype == torch.float32 or query.shape[-1] > 256:  # more than FlashAttention takes
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, keys, values, None, True, 0.0, causal, scale=scale
        )
        return out, lse[..., : query.shape[2]]  # the kernel pads it to a multiple of 32
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, keys, values, 0.0, causal, scale=scale)
    return out, lse


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None = None
) -> torch.Tensor:
    """Causal attention of a sequence's last n tokens.

    Args:
        query: (1, h, n, d). keys, values: (1, kv_heads, m, d), the last m tokens, m >= n. window: tokens that a
            query sees, itself included; None for all.

    Returns:
        (1, h, n, d) in the dtype of the query.
    """
    n, m = query.shape[2], keys.shape[2]
    if window is not None and m > window:
        blocks = []
        for first in range(0, n, _BLOCK):
            last = min(first + _BLOCK, n)
            low, high = max(0, m - n + first - window + 1), m - n + last
            at = torch.arange(m - n + first, high, device=query.device)[:, None]
            of = torch.arange(low, high, device=query.device)
            blocks.append(
                torch.nn.functional.scaled_dot_product_attention(
                    query[:, :, first:last],
                    keys[:, :, low:high],
                    values[:, :, low:high],
                    attn_mask=(of <= at) & (of > at - window),
                    scale=scale,
                    enable_gqa=True,
                )
            )
        return torch.cat(blocks, 2)
    if n == 1 or n == m:
        return _dense(query, keys, values, scale, causal=n > 1)[0]
    # The chunk itself is causal; everything before it is seen by all of its queries.
    out, lse = _dense(query, keys[:, :, m - n :], values[:, :, m - n :], scale, causal=True)
    earlier, earlier_lse = _dense(query, keys[:, :, : m - n], values[:, :, : m - n], scale, causal=False)
    merged, _ = merge_partials(out.float(), lse.float(), earlier.float(), earlier_lse.float())
    return merged.to(query.dtype)


def half(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """float16 on the CPU."""
    half = tensor.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ValueError(f"{what} do not fit float16")
    return half.cpu()


class Recorder:
    """The model's attention function: exact attention that keeps the queries of some layers.

    ``decoding`` says which: of each call the last token's (with attention to what is not indexed), or else those of
    ``prompt_positions``.
    """

    def __init__(
        self,
        layers: list[int],
        windows: list[int | None],
        prompt_positions: npt.NDArray[np.int64],
        sink: int,
        bound: int,
    ) -> None:
        self.decoding = False
        self.scale: dict[int, float] = {}
        self.prompt: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}  # (h, some, d) float16
        # q (kv_heads, g, d), osw (kv_heads, g, d) and lsw (kv_heads, g) of each decode query
        self.decode: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {layer: [] for layer in layers}
        self._windows = windows
        self._prompt_positions = prompt_positions
        self._sink = sink
        self._bound = bound

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """(1, n, h, d) from query (1, h, n, d) and the cache's key and value (1, kv_heads, m, d)."""
        for option in ("softcap", "s_aux", "position_bias"):
            if options.get(option) is not None:
                raise ValueError(f"the model's attention is no plain softmax: it uses {option}")
        # torch types every attribute of a module as a tensor or a module.
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        if layer in self.prompt:
            self.scale[layer] = scale
            if self.decoding:
                self._keep_decode(layer, query[0, :, -1], key[0], value[0])
            else:
                begin, end = key.shape[2] - query.shape[2], key.shape[2]
                wanted = self._prompt_positions[(self._prompt_positions >= begin) & (self._prompt_positions < end)]
                rows = query[0, :, torch.from_numpy(wanted - begin).to(query.device)]
                self.prompt[layer].append(half(rows, f"queries of layer {layer}"))
        return attend(query, key, value, scale, self._windows[layer]).transpose(1, 2).contiguous(), None

    def _keep_decode(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        # Computed from the rounded values, as a reader of the file would.
        q = half(query, f"queries of layer {layer}").unflatten(0, (key.shape[0], -1))
        keys, values = (
            half(torch.cat([t[:, : self._sink], t[:, self._bound :]], 1), f"keys or values of layer {layer}").float()
            for t in (key, value)
        )
        scores = self.scale[layer] * (q.float() @ keys.transpose(1, 2))
        out = torch.softmax(scores, -1) @ values
        self.decode[layer].append((q, out.to(torch.float16), torch.logsumexp(scores, -1)))


def global_layers(config: Any) -> list[int]:
    """Numbers of the layers with attention to all earlier tokens.

    Raises:
        ValueError: the model has layers of a kind that can not be run here.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=config).layers
    for number, layer in enumerate(layers):
        types = getattr(config.get_text_config(decoder=True), "layer_types", None)
        kind = types[number] if types else "full_attention"
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or kind == "chunked_attention":
            raise ValueError(f"layer {number} is of type {kind}: only full and sliding-window attention are supported")
    return [number for number, layer in enumerate(layers) if type(layer) is DynamicLayer]


def choose_layers(config: Any, layers: list[int] | None, heads: list[tuple[int, int]] | None = None) -> list[int]:
    """The layers asked for and those of ``heads``, or else up to four global ones spread evenly.

    Raises:
        ValueError: a layer or head asked for is not there, or the layer is not global.
    """
    there = global_layers(config)
    if heads is not None:
        decoder = config.get_text_config(decoder=True)
        count = getattr(decoder, "num_key_value_heads", None) or decoder.num_attention_heads
        if beyond := [head for _, head in heads if not 0 <= head < count]:
            raise ValueError(f"KV head {beyond[0]} is not there; the model has {count} in a layer")
        layers = [layer for layer, _ in heads] + (layers or [])
    if layers is None:
        count = min(4, len(there))
        return [there[(2 * i + 1) * len(there) // (2 * count)] for i in range(count)]
    if strangers := sorted(set(layers) - set(there)):
        raise ValueError(f"layer {strangers[0]} is not a global attention layer; these are: {there}")
    return sorted(set(layers))
