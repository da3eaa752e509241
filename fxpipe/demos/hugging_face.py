"""Demo models from Hugging Face configurations, with random weights: nothing is downloaded.

They are the library's own classes, called as users call them: keyword tensors with labels in, a ``ModelOutput`` with
``.loss`` out. Attention is PyTorch's ``scaled_dot_product_attention``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fxpipe.demos.seed import seeded
from fxpipe.errors import OptionError

Demo = tuple[nn.Module, dict[str, Tensor]]

COMMON = {"attn_implementation": "sdpa"}
DECODER = {**COMMON, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt(
    *,
    seed: int = 0,
    batch: int = 8,
    length: int = 64,
    vocabulary: int = 128,
    width: int = 64,
    n_layers: int = 4,
    n_heads: int = 4,
    dropout: float = 0.0,
) -> Demo:
    """GPT-2: a causal language model with its input and output embedding tied."""
    hf = _transformers("gpt")
    config = hf.GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=width,
        n_layer=n_layers,
        n_head=n_heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        **DECODER,
    )
    return _language_model(hf.GPT2LMHeadModel, config, "ForCausalLM", seed, (batch, length))


def llama(
    *,
    seed: int = 0,
    batch: int = 8,
    length: int = 32,
    vocabulary: int = 128,
    width: int = 64,
    n_layers: int = 4,
    n_heads: int = 4,
) -> Demo:
    """Llama: rotary positions, RMS norm, gated MLP, two query heads for each key and value head, untied."""
    hf = _transformers("llama")
    config = hf.LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=length,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads // 2,
        **DECODER,
    )
    return _language_model(hf.LlamaForCausalLM, config, "ForCausalLM", seed, (batch, length))


def bert(
    *,
    seed: int = 0,
    batch: int = 8,
    length: int = 32,
    vocabulary: int = 128,
    width: int = 64,
    n_layers: int = 4,
    n_heads: int = 4,
    dropout: float = 0.1,
) -> Demo:
    """BERT with its masked-language head: attention to both sides, a padding mask, dropout.

    The last four positions of every row are padding, without a label.
    """
    hf = _transformers("bert")
    config = hf.BertConfig(
        vocab_size=vocabulary,
        max_position_embeddings=length,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **COMMON,
    )
    model, inputs = _language_model(hf.BertForMaskedLM, config, "ForMaskedLM", seed, (batch, length))
    inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.int64)
    inputs["attention_mask"][:, -4:] = 0
    inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    return model, inputs


def vit(
    *,
    seed: int = 0,
    batch: int = 8,
    size: int = 32,
    patch: int = 8,
    width: int = 64,
    n_layers: int = 4,
    n_heads: int = 4,
    n_classes: int = 10,
) -> Demo:
    """The vision transformer with its classifier: ``pixel_values`` [batch, 3, size, size]."""
    hf = _transformers("vit")
    config = hf.ViTConfig(
        image_size=size,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_labels=n_classes,
        **COMMON,
    )
    with seeded(seed):
        model = _built(hf.ViTForImageClassification, config, "ForImageClassification")
        return model, {"pixel_values": torch.randn(batch, 3, size, size), "labels": torch.randint(n_classes, (batch,))}


def t5(
    *,
    seed: int = 0,
    batch: int = 8,
    length: int = 24,
    vocabulary: int = 128,
    width: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    dropout: float = 0.1,
) -> Demo:
    """T5: an encoder and a decoder of ``n_layers`` each; the encoder's output feeds every decoder layer."""
    hf = _transformers("t5")
    config = hf.T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // n_heads,
        d_ff=2 * width,
        num_layers=n_layers,
        num_heads=n_heads,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        **DECODER,
    )
    return _language_model(hf.T5ForConditionalGeneration, config, "ForConditionalGeneration", seed, (batch, length))


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise OptionError(f"demo {name!r} needs transformers ({error}): pip install 'fxpipe[hf]'") from error
    return transformers


def _language_model(kind: Any, config: Any, loss_type: str, seed: int, shape: tuple[int, int]) -> Demo:
    with seeded(seed):
        model = _built(kind, config, loss_type)
        tokens = torch.randint(1, config.vocab_size, shape)
        return model, {"input_ids": tokens, "labels": tokens.clone()}


def _built(kind: Any, config: Any, loss_type: str) -> nn.Module:
    """The model in train mode, with its loss named: the library warns when it must guess."""
    model: nn.Module = kind(config)
    model.loss_type = loss_type  # type: ignore[assignment]
    return model.train()
