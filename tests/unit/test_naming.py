"""Tensor names of real checkpoints, as their authors wrote them."""

import pytest

from stockflow.checkpoints.naming import KINDS, is_router, kind_of, layer_of

NAMES: dict[str, dict[str, tuple[str, int | None]]] = {
    "Llama": {
        "model.embed_tokens.weight": ("embedding", None),
        "model.layers.0.self_attn.q_proj.weight": ("attention", 0),
        "model.layers.31.self_attn.o_proj.weight": ("attention", 31),
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("other", 0),
        "model.layers.7.mlp.gate_proj.weight": ("mlp", 7),
        "model.layers.7.mlp.down_proj.weight": ("mlp", 7),
        "model.layers.7.input_layernorm.weight": ("norm", 7),
        "model.layers.7.post_attention_layernorm.weight": ("norm", 7),
        "model.norm.weight": ("norm", None),
        "lm_head.weight": ("head", None),
    },
    "Llama as Meta writes it": {
        "tok_embeddings.weight": ("embedding", None),
        "layers.3.attention.wq.weight": ("attention", 3),
        "layers.3.attention_norm.weight": ("norm", 3),
        "layers.3.feed_forward.w1.weight": ("mlp", 3),
        "output.weight": ("head", None),
    },
    "Qwen-MoE": {
        "model.layers.2.self_attn.q_norm.weight": ("norm", 2),
        "model.layers.2.self_attn.k_proj.bias": ("attention", 2),
        "model.layers.2.mlp.gate.weight": ("router", 2),
        "model.layers.2.mlp.experts.59.gate_proj.weight": ("experts", 2),
        "model.layers.2.mlp.shared_expert.up_proj.weight": ("experts", 2),
        "model.layers.2.mlp.shared_expert_gate.weight": ("router", 2),
        "model.layers.2.linear_attn.in_proj_qkvz.weight": ("attention", 2),
    },
    "Mixtral": {
        "model.layers.10.block_sparse_moe.gate.weight": ("router", 10),
        "model.layers.10.block_sparse_moe.experts.7.w2.weight": ("experts", 10),
        "model.layers.10.self_attn.v_proj.weight": ("attention", 10),
    },
    "Mixtral, experts fused": {
        "model.layers.10.mlp.experts.gate_up_proj": ("experts", 10),
        "model.layers.10.mlp.router.weight": ("router", 10),
        "model.layers.10.self_attn.sinks": ("attention", 10),
    },
    "DeepSeek": {
        "model.layers.4.self_attn.kv_a_proj_with_mqa.weight": ("attention", 4),
        "model.layers.4.self_attn.kv_a_layernorm.weight": ("norm", 4),
        "model.layers.4.mlp.gate.e_score_correction_bias": ("router", 4),
        "model.layers.4.mlp.shared_experts.down_proj.weight": ("experts", 4),
        "model.layers.4.mlp.experts.255.down_proj.weight": ("experts", 4),
        "model.layers.61.embed_tokens.weight": ("embedding", 61),
        "model.layers.61.enorm.weight": ("norm", 61),
        "model.layers.61.eh_proj.weight": ("other", 61),
        "model.layers.61.shared_head.head.weight": ("head", 61),
        "model.layers.61.shared_head.norm.weight": ("norm", 61),
    },
    "GPT-2": {
        "transformer.wte.weight": ("embedding", None),
        "wpe.weight": ("embedding", None),
        "h.11.ln_1.weight": ("norm", 11),
        "transformer.h.11.attn.c_attn.weight": ("attention", 11),
        "transformer.h.11.attn.bias": ("attention", 11),
        "transformer.h.11.mlp.c_fc.bias": ("mlp", 11),
        "ln_f.bias": ("norm", None),
    },
    "GPT-NeoX": {
        "gpt_neox.embed_in.weight": ("embedding", None),
        "gpt_neox.layers.1.attention.query_key_value.weight": ("attention", 1),
        "gpt_neox.layers.1.mlp.dense_h_to_4h.weight": ("mlp", 1),
        "embed_out.weight": ("head", None),
    },
    "BERT": {
        "bert.embeddings.word_embeddings.weight": ("embedding", None),
        "bert.embeddings.LayerNorm.weight": ("norm", None),
        "bert.encoder.layer.5.attention.self.query.weight": ("attention", 5),
        "bert.encoder.layer.5.attention.output.dense.weight": ("attention", 5),
        "bert.encoder.layer.5.attention.output.LayerNorm.gamma": ("norm", 5),
        "bert.encoder.layer.5.intermediate.dense.weight": ("mlp", 5),
        "bert.encoder.layer.5.output.dense.bias": ("mlp", 5),
        "bert.encoder.layer.5.output.LayerNorm.weight": ("norm", 5),
        "bert.pooler.dense.weight": ("head", None),
        "cls.predictions.decoder.weight": ("head", None),
        "classifier.bias": ("head", None),
    },
    "ViT": {
        "vit.embeddings.cls_token": ("embedding", None),
        "vit.embeddings.patch_embeddings.projection.weight": ("embedding", None),
        "vit.encoder.layer.3.attention.attention.query.weight": ("attention", 3),
        "vit.encoder.layer.3.layernorm_before.weight": ("norm", 3),
        "vit.encoder.layer.3.intermediate.dense.weight": ("mlp", 3),
        "vit.layernorm.weight": ("norm", None),
    },
    "ViT of timm": {
        "pos_embed": ("embedding", None),
        "cls_token": ("embedding", None),
        "patch_embed.proj.weight": ("embedding", None),
        "blocks.8.attn.qkv.weight": ("attention", 8),
        "blocks.8.norm1.bias": ("norm", 8),
        "blocks.8.mlp.fc2.weight": ("mlp", 8),
        "blocks.8.ls1.gamma": ("other", 8),
        "head.weight": ("head", None),
    },
    "CLIP of OpenAI": {
        "visual.class_embedding": ("embedding", None),
        "visual.ln_pre.weight": ("norm", None),
        "visual.transformer.resblocks.6.attn.in_proj_weight": ("attention", 6),
        "logit_scale": ("other", None),
    },
    "T5": {
        "shared.weight": ("embedding", None),
        "encoder.block.2.layer.0.SelfAttention.q.weight": ("attention", 2),
        "encoder.block.2.layer.1.DenseReluDense.wi_0.weight": ("mlp", 2),
        "encoder.block.2.layer.1.layer_norm.weight": ("norm", 2),
    },
}


@pytest.mark.parametrize("family", NAMES)
def test_names_of_real_checkpoints_have_their_kind_and_layer(family: str) -> None:
    assert NAMES[family] == {name: (kind_of(name), layer_of(name)) for name in NAMES[family]}


@pytest.mark.parametrize("name", ["", ".", "w", "layers", "layers.x.y", "layers.99999999999999999999.w", "ünïcode.ß"])
def test_any_name_has_a_kind(name: str) -> None:
    assert kind_of(name) in KINDS
    assert layer_of(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "model.layers.3.block_sparse_moe.gate.weight",
        "model.layers.3.block_sparse_moe.e_score_correction_bias",
        "model.layers.3.feed_forward.router.weight",
        "model.layers.3.feed_forward.expert_bias",
        "model.layers.3.mlp.router.bias",
        "transformer.blocks.3.ffn.router.layer.weight",
        "layers.3.ffn.gate.tid2eid",
        "backbone.layers.3.mixer.gate.weight",
    ],
)
def test_what_chooses_among_experts_is_a_router(name: str) -> None:
    assert is_router(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.gate_proj.weight",
        "model.layers.3.mlp.experts.7.gate_proj.weight",
        "model.layers.3.mlp.experts.7.gate.weight",
        "model.layers.3.mlp.shared_expert_gate.weight",
        "model.layers.3.self_attn.gate.weight",
        "model.layers.3.mlp.router.norm.weight",
        "model.layers.3.self_attn.q_bias",
    ],
)
def test_what_only_sounds_like_it_is_none(name: str) -> None:
    assert not is_router(name)
