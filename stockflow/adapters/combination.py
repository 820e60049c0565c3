"""Combination of adapters on one base into one: which factors are put side by side, pure; what it will be, in words.

A weighted sum of products of low rank is one of the summed rank: ``sum_i c_i B_i A_i = [c_1 B_1, ...] [A_1; ...]``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from stockflow.adapters.peft import factor_keys
from stockflow.adapters.sources import AdapterSource
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.storage import redact
from stockflow.text.escaping import in_a_line
from stockflow.text.sizes import counted, gb

Sources = Sequence[AdapterSource | None]


@dataclass(frozen=True, slots=True)
class FactorShare:
    """What one adapter gives to a module."""

    source: int
    keys: tuple[str, str]
    """of A and B"""
    rank: int
    weight: float
    """coefficient and scale"""


@dataclass(frozen=True, slots=True)
class CombinedModule:
    """The factors of a module."""

    module: str
    is_embedding: bool
    shares: tuple[FactorShare, ...]
    shape: tuple[int, int]
    """rows of B, columns of A"""
    rank: int

    @property
    def summed_rank(self) -> int:
        """The rank of all shares side by side."""
        return sum(share.rank for share in self.shares)

    def specs(self, dtype: str) -> tuple[TensorSpec, TensorSpec]:
        """Return A and B as they are written."""
        key_a, key_b = factor_keys(self.module, is_embedding=self.is_embedding)
        rows, columns = self.shape
        return TensorSpec(key_a, dtype, (self.rank, columns)), TensorSpec(key_b, dtype, (rows, self.rank))


@dataclass(frozen=True, slots=True)
class CombinedTensor:
    """A tensor that is held whole, by all adapters that count."""

    spec: TensorSpec
    """as it is written"""
    shares: tuple[tuple[int, str, float], ...]
    """source, key, weight"""


@dataclass(frozen=True)
class CombinationPlan:
    """What an adapter will be."""

    output_url: str
    base: str | None
    """what the base is called"""
    urls: tuple[str, ...]
    """of the adapters"""
    dtype: str
    """of the factors"""
    modules: tuple[CombinedModule, ...]
    tensors: tuple[CombinedTensor, ...]
    saved: tuple[str, ...]
    """modules that are saved whole"""
    has_biases: bool
    is_turned: bool
    """whether linear layers store weights as ``[in, out]``"""
    task: str | None
    """that PEFT wraps the model for"""
    num_read: int
    """bytes"""

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """The rank of every module with factors."""
        return {each.module: each.rank for each in self.modules}

    @property
    def num_bytes(self) -> int:
        """Size of the tensors that are written."""
        factors = sum(spec.num_bytes for each in self.modules for spec in each.specs(self.dtype))
        return factors + sum(each.spec.num_bytes for each in self.tensors)

    def facts(self) -> dict[str, object]:
        """Return it for programs."""
        return {
            "output": redact(self.output_url),
            "base": self.base and redact(self.base),
            "adapters": list(map(redact, self.urls)),
            "dtype": self.dtype,
            "modules": [
                {"name": each.module, "shape": each.shape, "rank": each.rank, "summed_rank": each.summed_rank}
                for each in self.modules
            ],
            "whole": [each.spec.name for each in self.tensors],
            "bytes_read": self.num_read,
            "bytes_written": self.num_bytes,
        }

    def lines(self) -> Iterator[str]:
        """Yield it for people."""
        of_adapters = f"of {counted(len(self.urls), 'adapter')}; no weight of the base is read"
        yield f"adapter {redact(self.output_url)} {of_adapters}"
        yield from (f"  input   {redact(url)}" for url in self.urls)
        yield f"  base    {in_a_line(redact(self.base)) if self.base else 'not said'}"
        yield f"  targets {counted(len(self.modules), 'module')}: {ranks_in_words(self.modules)}"
        yield f"  whole   {counted(len(self.tensors), 'tensor')}"
        yield f"  output  {gb(self.num_bytes)} in {self.dtype}; {gb(self.num_read)} are read"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def ranks_in_words(modules: Sequence[CombinedModule]) -> str:
    """Return the ranks of modules, and what they would be if none was cut."""
    ranks = sorted({each.rank for each in modules})
    told = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    most = max(each.summed_rank for each in modules)
    is_cut = any(each.rank < each.summed_rank for each in modules)
    return f"{told}, cut from {most} at most" if is_cut else f"{told}, exactly the sum"
