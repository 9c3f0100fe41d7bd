"""Tiny random models of most text families of transformers, to try prefixes on.

Two to four layers, width 32, a vocabulary as small as the tokenizer given, weights large enough that attention is far
from uniform, and every dropout rate above zero. Where an architecture has a peculiarity that a prefix could stumble
over (grouped-query attention, short windows, layers that share keys, different depths and head counts of encoder and
decoder, head sizes that do not multiply to the width), the model here has it.

Knows nothing of prefixes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

__all__ = [
    "MAX_POSITIONS",
    "NUM_BYTES",
    "ZOO",
    "Entry",
    "exists",
    "make_model",
    "make_tokenizer",
    "random_model",
    "store_model",
]

Kind = Literal["decoder", "hybrid", "encoder-decoder", "encoder"]

MAX_POSITIONS = 160
_DROP = 0.1

# Printable ASCII, line breaks, and the bytes of "é" and "€", so that a character may span tokens.
_BYTES = [*range(32, 127), 10, 13, *"é€".encode()]

NUM_BYTES = len(_BYTES)
"""Ordinary tokens; the special ones come after them."""


@dataclass(frozen=True)
class Entry:
    """One kind of model.

    Attributes:
        name: What it is called here; the model type, with a suffix where there are several of one type.
        kind: Decoder-only, decoder-only with layers that are no softmax attention, encoder-decoder, or encoder.
        family: Well-known models of this type, for people to recognize.
        model_type: As transformers calls it.
        settings: What its configuration is made with, besides the tokens.
        vocabulary: Further settings that hold the vocabulary's size.
        parts: Settings that are configurations of their own.
    """

    name: str
    kind: Kind
    family: str
    model_type: str
    settings: Mapping[str, Any] = field(repr=False)
    vocabulary: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    def config(self, tokenizer: Any, **changes: Any) -> Any:
        """Its configuration, for this tokenizer; `changes` win over its settings."""
        from transformers import AutoConfig

        tokens = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        settings = {"tie_word_embeddings": False, **tokens, **dict.fromkeys(self.vocabulary, len(tokenizer))}
        if self.kind == "encoder-decoder":
            settings |= {"decoder_start_token_id": tokenizer.bos_token_id, "forced_eos_token_id": None}
        settings |= {**self.settings, **changes}
        for part in self.parts:
            settings[part] = {**tokens, **settings[part]}
        config = AutoConfig.for_model(self.model_type, **settings)
        for one in (config, *(getattr(config, part) for part in self.parts)):
            for name, value in vars(one).items():
                if "drop" in name and isinstance(value, float):
                    setattr(one, name, _DROP)
        return config


# --- settings that many share ----------------------------------------------------------------------------------------

_PLAIN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_FALCON = {**_PLAIN, "ffn_hidden_size": 48}
_FALCON_40B = {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
_FALCON_RW = {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
_MODERN = {**_PLAIN, "local_attention": 8, "layer_types": ["full_attention", *["sliding_attention"] * 2]}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": MAX_POSITIONS}
_BERT = {**_PLAIN, "type_vocab_size": 2}
_ROBERTA = {**_BERT, "max_position_embeddings": MAX_POSITIONS + 128}
"""Positions begin after the padding's id, which here is high."""
_BART = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": MAX_POSITIONS,
}
_T5 = {
    "d_model": 32,
    "d_kv": 12,
    "num_heads": 4,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention"]
_WINDOWED = {**_GROUPED, "sliding_window": 4, "layer_types": _SLIDING_AND_FULL}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 24}
_LATENT = {
    **_PLAIN,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_DELTA = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_FOUR_LAYERS = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
_GEMMA_SHARED = {
    **_GROUPED,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "sliding_window": 4,
    "hidden_size_per_layer_input": 8,
}
_GEMMA_PART = {**_GROUPED, "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16}


def _entry(
    kind: Kind,
    name: str,
    family: str,
    *shared: Mapping[str, Any],
    model_type: str = "",
    vocabulary: tuple[str, ...] = (),
    parts: tuple[str, ...] = (),
    **settings: Any,
) -> Entry:
    """One entry; its own settings come after those that it shares with others."""
    merged = {key: value for one in (*shared, settings) for key, value in one.items()}
    return Entry(name, kind, family, model_type or name, merged, vocabulary, parts)


_decoder, _hybrid = partial(_entry, "decoder"), partial(_entry, "hybrid")
_encoder_decoder, _encoder = partial(_entry, "encoder-decoder"), partial(_entry, "encoder")


# --- the table -------------------------------------------------------------------------------------------------------

_DECODERS = (
    _decoder("gpt2", "GPT-2, DistilGPT-2", _GPT2),
    _decoder("openai-gpt", "GPT-1", _GPT2),
    _decoder(
        "gpt_neo",
        "GPT-Neo",
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        intermediate_size=48,
        window_size=4,
        attention_types=[[["global", "local", "global"], 1]],
        max_position_embeddings=MAX_POSITIONS,
    ),
    _decoder("gptj", "GPT-J", _GPT2, rotary_dim=4),
    _decoder("gpt_neox", "Pythia, GPT-NeoX", _PLAIN),
    _decoder("gpt_neox_japanese", "GPT-NeoX Japanese", _PLAIN, intermediate_multiple_size=2),
    _decoder("gpt_bigcode", "StarCoder, SantaCoder", _GPT2, multi_query=True),
    _decoder("opt", "OPT, Galactica", _PLAIN, ffn_dim=48, word_embed_proj_dim=32),
    _decoder("bloom", "BLOOM, BLOOMZ", hidden_size=32, n_layer=3, n_head=4),
    _decoder("falcon", "Falcon", _FALCON),
    _decoder("falcon-grouped", "Falcon-40B, Falcon 2", _FALCON_40B, model_type="falcon"),
    _decoder("falcon-alibi", "Falcon-RW", _FALCON_RW, model_type="falcon"),
    _decoder("mpt", "MPT", d_model=32, n_heads=4, n_layers=3, max_seq_len=MAX_POSITIONS),
    _decoder("llama", "LLaMA, SmolLM2, TinyLlama, Vicuna", _GROUPED),
    _decoder("mistral", "Mistral 7B", _GROUPED, sliding_window=4),
    _decoder("mixtral", "Mixtral", _GROUPED, _EXPERTS),
    _decoder("ministral", "Ministral", _WINDOWED, head_dim=8),
    _decoder("ministral3", "Ministral 3", _GROUPED, head_dim=16),
    _decoder("qwen2", "Qwen2, Qwen2.5", _GROUPED),
    _decoder("qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B", _GROUPED, _EXPERTS, shared_expert_intermediate_size=24),
    _decoder("qwen3", "Qwen3", _GROUPED, head_dim=16),
    _decoder("qwen3_moe", "Qwen3-30B-A3B", _GROUPED, _EXPERTS, head_dim=16),
    _decoder("phi", "Phi-1.5, Phi-2", _PLAIN),
    _decoder("phi3", "Phi-3, Phi-4", _GROUPED),
    _decoder("phimoe", "Phi-3.5-MoE", _GROUPED, _EXPERTS, sliding_window=4),
    _decoder("gemma", "Gemma", _GROUPED, head_dim=16),
    _decoder("gemma2", "Gemma 2", _GEMMA_PART),
    _decoder("gemma3_text", "Gemma 3 (text)", _WINDOWED, head_dim=16, query_pre_attn_scalar=16),
    _decoder(
        "gemma3n_text",
        "Gemma 3n (text)",
        _GEMMA_SHARED,
        head_dim=16,
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        vocabulary=("vocab_size_per_layer_input",),
    ),
    _decoder(
        "gemma4_text",
        "Gemma 4 (text)",
        _GEMMA_SHARED,
        head_dim=8,
        per_layer_config={"1": {"head_dim": 16}, "3": {"head_dim": 16}},
        vocabulary=("vocab_size_per_layer_input",),
    ),
    _decoder("olmo", "OLMo", _GROUPED),
    _decoder("olmo2", "OLMo 2", _GROUPED),
    _decoder("olmo3", "OLMo 3", _WINDOWED),
    _decoder("olmoe", "OLMoE", _GROUPED, _EXPERTS),
    _decoder("starcoder2", "StarCoder2", _GROUPED, sliding_window=4),
    _decoder("cohere", "Command R", _GROUPED, use_qk_norm=True),
    _decoder("cohere2", "Command R7B", _WINDOWED),
    _decoder("glm", "GLM-4-9B", _GROUPED, head_dim=8),
    _decoder("glm4", "GLM-4-0414", _GROUPED, head_dim=8),
    _decoder("glm4_moe", "GLM-4.5", _GROUPED, _ROUTED, head_dim=8),
    _decoder("deepseek_v2", "DeepSeek-V2", _LATENT, _ROUTED),
    _decoder("deepseek_v3", "DeepSeek-V3, DeepSeek-R1", _LATENT, _ROUTED),
    _decoder("minicpm3", "MiniCPM3", _LATENT, head_dim=4, dim_model_base=16),
    _decoder("smollm3", "SmolLM3", _GROUPED, no_rope_layers=[1, 1, 0]),
    _decoder("granite", "Granite 3", _GROUPED, attention_multiplier=0.3, embedding_multiplier=2.0),
    _decoder("granitemoe", "Granite 3 MoE", _GROUPED, _EXPERTS, attention_multiplier=0.3),
    _decoder("stablelm", "StableLM", _GROUPED),
    _decoder(
        "llama4_text",
        "Llama 4 (text)",
        _GROUPED,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        moe_layers=[1],
        attention_chunk_size=8,
        no_rope_layers=[1, 1, 0],
        layer_types=["chunked_attention", "chunked_attention", "full_attention"],
    ),
    _decoder("gpt_oss", "gpt-oss", _WINDOWED, _EXPERTS, head_dim=16),
    _decoder("exaone4", "EXAONE 4", _WINDOWED),
    _decoder("helium", "Helium", _GROUPED, head_dim=8),
    _decoder("apertus", "Apertus", _GROUPED),
    _decoder("arcee", "AFM", _GROUPED, head_dim=8),
    _decoder("seed_oss", "Seed-OSS", _GROUPED, head_dim=8),
    _decoder("ernie4_5", "ERNIE 4.5", _GROUPED, head_dim=8),
    _decoder("hunyuan_v1_dense", "Hunyuan", _GROUPED, head_dim=8),
    _decoder("bitnet", "BitNet b1.58", _GROUPED),
    _decoder("nanochat", "nanochat", _PLAIN),
    _decoder("nemotron", "Nemotron-4, Minitron", _GROUPED, head_dim=8),
    _decoder("persimmon", "Persimmon", _PLAIN),
    _decoder("codegen", "CodeGen", _GPT2, n_ctx=MAX_POSITIONS, rotary_dim=4),
    _decoder(
        "xglm", "XGLM", d_model=32, ffn_dim=48, num_layers=3, attention_heads=4, max_position_embeddings=MAX_POSITIONS
    ),
    _decoder("biogpt", "BioGPT", _PLAIN),
    _decoder("ctrl", "CTRL", _GPT2, dff=48),
    _decoder("modernbert-decoder", "Ettin (decoder)", _MODERN),
)

_HYBRIDS = (
    _hybrid("mamba", "Mamba", hidden_size=32, state_size=8, num_hidden_layers=3, time_step_rank=4),
    _hybrid(
        "mamba2",
        "Mamba 2, Codestral Mamba",
        hidden_size=32,
        state_size=8,
        num_hidden_layers=3,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        chunk_size=8,
    ),
    _hybrid(
        "jamba",
        "Jamba",
        _GROUPED,
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    _hybrid("bamba", "Bamba", _GROUPED, _MAMBA2, num_hidden_layers=4, attn_layer_indices=[1, 3]),
    _hybrid(
        "lfm2",
        "LFM2",
        _GROUPED,
        num_hidden_layers=4,
        layer_types=["conv", "full_attention"] * 2,
        block_auto_adjust_ff_dim=False,
    ),
    _hybrid(
        "qwen3_next",
        "Qwen3-Next",
        _GROUPED,
        _EXPERTS,
        _DELTA,
        _FOUR_LAYERS,
        head_dim=16,
        shared_expert_intermediate_size=24,
    ),
    _hybrid("qwen3_5_text", "Qwen3.5 (text)", _GROUPED, _DELTA, _FOUR_LAYERS, head_dim=16),
    _hybrid("olmo_hybrid", "OLMo Hybrid", _PLAIN, _DELTA, _FOUR_LAYERS, linear_num_key_heads=4),
    _hybrid("minimax", "MiniMax-Text-01", _GROUPED, _EXPERTS, _FOUR_LAYERS, block_size=4),
    _hybrid(
        "minimax-full-first",
        "MiniMax with full attention first",
        _GROUPED,
        _EXPERTS,
        _FOUR_LAYERS,
        layer_types=["full_attention", "linear_attention"] * 2,
        model_type="minimax",
    ),
    _hybrid("falcon_h1", "Falcon-H1", _GROUPED, _MAMBA2, mamba_d_ssm=64),
    _hybrid("granitemoehybrid", "Granite 4", _GROUPED, _MAMBA2, _EXPERTS, _FOUR_LAYERS, shared_intermediate_size=24),
    _hybrid(
        "nemotron_h",
        "Nemotron-H, Nemotron Nano",
        _GROUPED,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "full_attention", "mlp", "full_attention"],
        head_dim=8,
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        chunk_size=8,
        use_mamba_kernels=False,
    ),
    _hybrid(
        "zamba2",
        "Zamba2",
        _PLAIN,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        hybrid_layer_ids=[1, 3],
        num_key_value_heads=4,
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_headdim=8,
        chunk_size=8,
        adapter_rank=4,
        use_mamba_kernels=False,
        num_mem_blocks=1,
        use_mem_rope=True,
    ),
    _hybrid(
        "recurrent_gemma",
        "RecurrentGemma",
        _GROUPED,
        lru_width=32,
        attention_window_size=4,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    _hybrid(
        "rwkv",
        "RWKV-4",
        hidden_size=32,
        attention_hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        context_length=MAX_POSITIONS,
    ),
)

_ENCODER_DECODERS = (
    _encoder_decoder("bart", "BART", _BART),
    _encoder_decoder("mbart", "mBART-50", _BART),
    _encoder_decoder("pegasus", "PEGASUS", _BART),
    _encoder_decoder("marian", "OPUS-MT", _BART, vocabulary=("decoder_vocab_size",)),
    _encoder_decoder("blenderbot", "BlenderBot", _BART, encoder_no_repeat_ngram_size=0),
    _encoder_decoder("blenderbot-small", "BlenderBot small", _BART),
    _encoder_decoder("m2m_100", "M2M-100, NLLB-200", _BART),
    _encoder_decoder(
        "nllb-moe", "NLLB-MoE", _BART, num_experts=2, expert_capacity=512, encoder_sparse_step=2, decoder_sparse_step=2
    ),
    _encoder_decoder("plbart", "PLBART", _BART),
    _encoder_decoder("mvp", "MVP", _BART),
    _encoder_decoder(
        "fsmt", "FSMT (WMT19)", _BART, langs=["en", "de"], vocabulary=("src_vocab_size", "tgt_vocab_size")
    ),
    _encoder_decoder("t5", "T5", _T5),
    _encoder_decoder("t5-gated", "T5 v1.1, Flan-T5", _T5, feed_forward_proj="gated-gelu", model_type="t5"),
    _encoder_decoder("mt5", "mT5", _T5),
    _encoder_decoder("umt5", "umT5", _T5),
    _encoder_decoder(
        "switch_transformers",
        "Switch Transformers",
        _T5,
        num_experts=2,
        expert_capacity=512,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    _encoder_decoder(
        "longt5-local", "LongT5 (local)", _T5, encoder_attention_type="local", local_radius=3, model_type="longt5"
    ),
    _encoder_decoder(
        "longt5-global",
        "LongT5 (transient-global)",
        _T5,
        encoder_attention_type="transient-global",
        local_radius=3,
        global_block_size=4,
        model_type="longt5",
    ),
    _encoder_decoder(
        "led",
        "LED",
        _BART,
        attention_window=4,
        max_encoder_position_embeddings=MAX_POSITIONS,
        max_decoder_position_embeddings=MAX_POSITIONS,
    ),
    _encoder_decoder("pegasus_x", "PEGASUS-X", _BART, num_global_tokens=4, block_size=8),
    _encoder_decoder("bigbird_pegasus", "BigBird-Pegasus", _BART, attention_type="original_full", use_bias=True),
    _encoder_decoder(
        "prophetnet",
        "ProphetNet",
        hidden_size=32,
        encoder_ffn_dim=48,
        decoder_ffn_dim=40,
        num_encoder_layers=3,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        num_buckets=8,
        relative_max_distance=20,
        # Its positions begin after the padding's id, and its cached decoding is right for 0 only.
        pad_token_id=0,
    ),
    _encoder_decoder(
        "whisper",
        "Whisper",
        _BART,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=MAX_POSITIONS,
        begin_suppress_tokens=None,
    ),
    _encoder_decoder(
        "t5gemma",
        "T5Gemma",
        encoder=_GEMMA_PART,
        decoder={**_GEMMA_PART, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
        parts=("encoder", "decoder"),
    ),
)

_ENCODERS = (
    _encoder("bert", "BERT", _BERT),
    _encoder("roberta", "RoBERTa", _ROBERTA),
    _encoder("xlm-roberta", "XLM-R", _ROBERTA),
    _encoder("camembert", "CamemBERT", _ROBERTA),
    _encoder(
        "distilbert", "DistilBERT", dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=MAX_POSITIONS
    ),
    _encoder("electra", "ELECTRA", _BERT, embedding_size=16),
    _encoder("albert", "ALBERT", _BERT, embedding_size=16),
    _encoder("mpnet", "MPNet", _ROBERTA),
    _encoder("deberta", "DeBERTa", _PLAIN, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _encoder(
        "deberta-v2",
        "DeBERTa-v3, mDeBERTa",
        _PLAIN,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    ),
    _encoder("modernbert", "ModernBERT, Ettin (encoder)", _MODERN),
    _encoder("eurobert", "EuroBERT", _GROUPED, head_dim=8),
    _encoder("nomic_bert", "nomic-embed-text", _BERT, head_dim=8),
    _encoder("roformer", "RoFormer", _BERT, embedding_size=32),
    _encoder("rembert", "RemBERT", _BERT, input_embedding_size=16, output_embedding_size=24),
    _encoder("esm", "ESM-2", _ROBERTA, position_embedding_type="rotary", mask_token_id=0),
    _encoder(
        "funnel",
        "Funnel Transformer",
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=48,
        block_sizes=[1, 1, 1],
        block_repeats=[1, 1, 1],
        architectures=["FunnelModel"],
        num_decoder_layers=1,
    ),
    _encoder("fnet", "FNet", _BERT, max_position_embeddings=MAX_POSITIONS),
)

ZOO: Mapping[str, Entry] = {entry.name: entry for entry in (*_DECODERS, *_HYBRIDS, *_ENCODER_DECODERS, *_ENCODERS)}
"""Every entry, by its name."""


# --- making one ------------------------------------------------------------------------------------------------------


def make_tokenizer(*, enclosing: bool = False) -> Any:
    """One token per byte, with <s>, </s> and <pad>.

    Args:
        enclosing: Whether it puts <s> and </s> around every text, as tokenizers of encoders do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    # How byte-level tokenizers write a byte: as itself where it is printable, else from U+0100 on.
    alphabet = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(other)}
    vocabulary = {alphabet[byte]: number for number, byte in enumerate(_BYTES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    if enclosing:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B </s>",
            special_tokens=[("<s>", made.bos_token_id), ("</s>", made.eos_token_id)],
        )
    return made


def exists(name: str) -> bool:
    """Whether the installed transformers has this entry's model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return ZOO[name].model_type in CONFIG_MAPPING


def make_model(model_type: str, tokenizer: Any, seed: int = 0, **changes: Any) -> Any:
    """A random model, in evaluation mode; the same one for the same seed.

    Args:
        model_type: An entry's name.
        tokenizer: Whose vocabulary and special tokens the model takes.
        seed: Of its weights.
        **changes: Settings of its configuration, in place of the entry's.
    """
    import transformers

    entry = ZOO[model_type]
    auto = {
        "decoder": transformers.AutoModelForCausalLM,
        "hybrid": transformers.AutoModelForCausalLM,
        "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
        "encoder": transformers.AutoModel,
    }[entry.kind]
    if entry.model_type == "whisper":
        auto = transformers.AutoModelForSpeechSeq2Seq
    return random_model(auto, entry.config(tokenizer, **changes), seed)


def store_model(folder: Path, name: str, *, enclosing: bool = False, seed: int = 0, **changes: Any) -> str:
    """Store a random model with its tokenizer, as users have one; its folder.

    Args:
        folder: Where to.
        name: An entry's name.
        enclosing: Whether the tokenizer puts <s> and </s> around every text.
        seed: Of the weights.
        **changes: Settings of its configuration, in place of the entry's.
    """
    tokenizer = make_tokenizer(enclosing=enclosing)
    make_model(name, tokenizer, seed, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def random_model(auto: Any, config: Any, seed: int = 0) -> Any:
    """A random model of a configuration, in evaluation mode.

    Args:
        auto: Which of transformers' classes makes it.
        config: Its configuration.
        seed: Of its weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config)
        # Weights large enough that attention is far from uniform, and no bias or norm at its neutral start.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1))
            for name, module in model.named_modules():
                # T5's scores are not scaled; trained models have the scale in their queries' weights.
                if name.endswith(("SelfAttention.q", "EncDecAttention.q")):
                    module.weight.mul_(model.config.d_kv**-0.5)
    return model.eval()
