"""One base model and several fine-tunings of it: numbers of steps and seeds are fixed, no clock is read.

Shape suffixes: B sequences of T tokens.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stockflow.demo import corpus
from stockflow.demo.language_model import LanguageModel, ModelConfig, initialize

NUM_THREADS = 2
SEQUENCE_TOKENS = 128
SEQUENCES_PER_STEP = 8
STEPS_PER_REPORT = 40
WARMUP_SHARE = 0.1

HELD_OUT_TOKENS = 256
HELD_OUT_SEQUENCES = 24
"""held-out sequences per theme, of HELD_OUT_TOKENS predictions each"""

CONFIG = ModelConfig(
    vocab_size=corpus.VOCAB_SIZE,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=512,
)


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and in which random order a model is trained."""

    num_steps: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Tuning:
    """One way to fine-tune the base: the themes it reads and its schedule."""

    name: str
    themes: tuple[str, ...]
    schedule: Schedule


BASE = Schedule(num_steps=320, learning_rate=3e-3, seed=0)

# Each theme is read by two of the four, at different learning rates and in a different order.
TUNINGS = (
    Tuning("concurrency-network", ("concurrency", "network"), Schedule(50, 1e-3, seed=1)),
    Tuning("network-formats", ("network", "formats"), Schedule(50, 1.5e-3, seed=2)),
    Tuning("formats-testing", ("formats", "testing"), Schedule(50, 1e-3, seed=3)),
    Tuning("testing-concurrency", ("testing", "concurrency"), Schedule(50, 1.5e-3, seed=4)),
)

Report = Callable[[str], None]


def train_base(report: Report) -> LanguageModel:
    """Return a model trained from scratch on the base text."""
    model = LanguageModel(CONFIG)
    initialize(model, BASE.seed)
    train(model, corpus.base_text(), BASE, lambda line: report(f"base: {line}"))
    return model


def fine_tune(base: LanguageModel, tuning: Tuning, report: Report) -> LanguageModel:
    """Return a copy of the base trained further on the tuning's themes."""
    model = copy.deepcopy(base)
    text = torch.cat([corpus.tuning_text(theme) for theme in tuning.themes])
    train(model, text, tuning.schedule, lambda line: report(f"{tuning.name}: {line}"))
    return model


def train(model: LanguageModel, text: Tensor, schedule: Schedule, report: Report) -> None:
    """Train a model in place on windows drawn from the text; the rate warms up, then falls to zero."""
    batches = random_windows(text, schedule.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(1, schedule.num_steps + 1):
        loss = model.loss(next(batches))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.param_groups[0]["lr"] = schedule.learning_rate * rate_share(step, schedule.num_steps)
        optimizer.step()
        if step % STEPS_PER_REPORT == 0 or step == schedule.num_steps:
            report(f"step {step} of {schedule.num_steps}, loss {loss.item():.3f}")


def rate_share(step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate at a step, counted from 1."""
    num_warmup = WARMUP_SHARE * num_steps
    return min(step / num_warmup, (num_steps - step + 1) / (num_steps - num_warmup), 1.0)


def random_windows(text: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield batches [B, T + 1] of windows that start anywhere in the text."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(SEQUENCE_TOKENS + 1)
    while True:
        starts = torch.randint(len(text) - SEQUENCE_TOKENS, (SEQUENCES_PER_STEP, 1), generator=generator)
        yield text[starts + offsets]


def held_out_windows(theme: str) -> Tensor:
    """Return windows spread evenly over a theme's held-out text, one per row."""
    text = corpus.held_out_text(theme)
    last_start = len(text) - HELD_OUT_TOKENS - 1
    starts = torch.linspace(0, last_start, HELD_OUT_SEQUENCES, dtype=torch.float64).long()
    return text[starts[:, None] + torch.arange(HELD_OUT_TOKENS + 1)]


@torch.no_grad()
def evaluate(model: LanguageModel) -> float:
    """Return the held-out loss in nats per byte; every theme counts the same."""
    windows = torch.cat([held_out_windows(theme) for theme in corpus.THEMES])
    batches = torch.chunk(windows, len(windows) // SEQUENCES_PER_STEP)
    return sum(model.loss(batch).item() for batch in batches) / len(batches)


@contextmanager
def fixed_threads() -> Iterator[None]:
    """Compute with NUM_THREADS threads, on which the order of torch's sums depends, then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
