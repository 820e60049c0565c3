"""A small Llama in plain torch: names and arithmetic are those of ``transformers.LlamaForCausalLM``.

Shape suffixes: B sequences of T tokens, D hidden size, H heads of size K, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model; the fields are named as in ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        """K, the size of one attention head."""
        return self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``."""

    def __init__(self, size: int, eps: float) -> None:
        """Start from a weight of ones."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the normed hidden states."""
        return F.rms_norm(hidden_BTD, self.weight.shape, self.weight, self.eps)


def rotary_angles(config: ModelConfig, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position's angles, each [T, K], the frequencies twice side by side."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    angles = torch.outer(torch.arange(num_tokens, dtype=torch.float32), frequencies)
    angles_TK = torch.cat((angles, angles), dim=-1)
    return angles_TK.cos(), angles_TK.sin()


def rotate(states_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Turn each pair (k, k + K/2) by its position's angle: the half-split layout, not the interleaved one."""
    first, second = states_BHTK.chunk(2, dim=-1)
    return states_BHTK * cos_TK + torch.cat((-second, first), dim=-1) * sin_TK


class Attention(nn.Module):
    """Causal attention whose key and value heads are shared by groups of query heads."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the four projections, without bias."""
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """Return what each token gathers from itself and the tokens before it."""
        query_BHTK = rotate(self._heads(self.q_proj(hidden_BTD)), cos_TK, sin_TK)
        key_BHTK = rotate(self._heads(self.k_proj(hidden_BTD)), cos_TK, sin_TK)
        value_BHTK = self._heads(self.v_proj(hidden_BTD))
        mixed_BHTK = F.scaled_dot_product_attention(query_BHTK, key_BHTK, value_BHTK, is_causal=True, enable_gqa=True)
        output_BTD: Tensor = self.o_proj(mixed_BHTK.transpose(1, 2).flatten(2))
        return output_BTD

    def _heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], -1, self.head_dim).transpose(1, 2)


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the three projections, without bias."""
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the gated projection of each token."""
        gated = F.silu(self.gate_proj(hidden_BTD)) * self.up_proj(hidden_BTD)
        output_BTD: Tensor = self.down_proj(gated)
        return output_BTD


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each on normed states and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        """Make both halves and their norms."""
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """Return the next layer's hidden states."""
        hidden_BTD = hidden_BTD + self.self_attn(self.input_layernorm(hidden_BTD), cos_TK, sin_TK)
        output_BTD: Tensor = hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))
        return output_BTD


class Decoder(nn.Module):
    """Token embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the embedding, the layers and the norm."""
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the last hidden states, normed."""
        cos_TK, sin_TK = rotary_angles(self.config, tokens_BT.shape[1])
        hidden_BTD = self.embed_tokens(tokens_BT)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, cos_TK, sin_TK)
        normed_BTD: Tensor = self.norm(hidden_BTD)
        return normed_BTD


class LanguageModel(nn.Module):
    """A decoder and its untied output projection."""

    def __init__(self, config: ModelConfig) -> None:
        """Make a model whose weights `initialize` or `load_state_dict` must set."""
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def config(self) -> ModelConfig:
        """The shape this model was made with."""
        return self.model.config

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits of each next token, [B, T, V]."""
        logits_BTV: Tensor = self.lm_head(self.model(tokens_BT))
        return logits_BTV

    def loss(self, tokens_BT: Tensor) -> Tensor:
        """Return the mean cross-entropy, in nats per token, of each token given those before it."""
        logits_BTV = self(tokens_BT[:, :-1])
        return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())


def initialize(model: LanguageModel, seed: int) -> None:
    """Draw every matrix from a normal distribution with variance 1 / fan-in; norms stay at one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
