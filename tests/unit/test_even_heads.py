# SPDX-License-Identifier: Apache-2.0
"""The model that tests/gpu/batch.sh makes for two ranks says what the model says that it is made of."""

import torch

from tests.gpu.even_heads import even_heads


def test_a_model_with_another_head_of_zeros_says_the_same(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=144, intermediate_size=96, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, head_dim=16,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    even_heads(tmp_path / "odd", tmp_path / "even")
    odd, even = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("odd", "even"))
    assert (even.config.num_attention_heads, even.config.num_key_value_heads) == (12, 4)
    tokens = torch.randint(0, 64, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(even(tokens).logits, odd(tokens).logits, atol=1e-4, rtol=1e-4)
