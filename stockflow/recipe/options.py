"""Options: what stands under `stockflow:` in a recipe, for which mergekit has no word."""

from typing import Literal

from pydantic import Field, StrictBool, StrictInt

from stockflow.methods.protocol import Scope
from stockflow.recipe.locations import Endpoint, Location, UrlPrefix
from stockflow.recipe.settings import Part, Settings
from stockflow.recipe.values import LayerPattern, MethodName, OutputFormat, RemarkCode, Size


class Rule(Part):
    """What happens to the tensors whose name contains ``filter``; the first matching rule wins."""

    filter: str = Field(description="part of the tensor's name; `*` matches every tensor")
    action: Literal["copy", "skip"] | None = Field(default=None, description="copy from the base, or leave out")
    merge_method: MethodName | None = Field(default=None, description="another method for these tensors")
    parameters: Settings = Field(default={}, description="parameters of that method, before all others")


class StorageEntry(Part):
    """How to reach the objects under one URL prefix; never a secret."""

    endpoint: Endpoint | None = Field(default=None, description="service URL")
    region: str | None = Field(default=None, description="region of the bucket; found by itself on AWS")
    addressing: Literal["auto", "path", "virtual"] = Field(default="auto", description="place of the bucket's name")
    anonymous: StrictBool = Field(default=False, description="send unsigned requests")
    requester_pays: StrictBool = Field(default=False, description="agree to pay for requests")
    kms_key: str | None = Field(default=None, description="name of the key that encrypts what is written")
    ca_bundle: str | None = Field(default=None, description="file with the certificates to trust")
    client: Literal["auto", "obstore", "fsspec"] = Field(default="auto", description="`fsspec`: the general path")


class Options(Part):
    """What mergekit has no word for."""

    on_negative: Literal["clamp", "extrapolate", "error"] = Field(
        default="clamp",
        description="Model Stock with a negative mean cosine: keep the base, extrapolate, or stop",
    )
    on_nonfinite: Literal["error", "propagate"] = Field(default="error", description="what NaN and infinity do")
    scope: Scope | None = Field(
        default=None,
        description="what is decided as one: a tensor, a row, a leading index (an expert), all experts of a layer",
    )
    seed: StrictInt = Field(
        default=0, ge=0, lt=2**63, description="what random methods draw by; part of their plan, and of no other"
    )
    keep_precision: StrictBool = Field(
        default=True, description="whether what every model stores finer than the rest of its weights stays so"
    )
    output_format: OutputFormat | None = Field(
        default=None,
        description="what tensors are written in: `keep` what the base has, the default where it is quantised and no "
        "`dtype` is given; `fp8_block`; or a float format",
    )
    routers: Literal["merge", "copy"] = Field(
        default="merge", description="whether what chooses among experts is merged, or copied from the base"
    )
    experts: Literal["separate", "fused"] | None = Field(
        default=None,
        description="whether experts are written one by one or all of a layer together; else as the base's",
    )
    output: Literal["model", "adapter"] = Field(
        default="model", description="what is written: a model or, of adapters on one base, an adapter"
    )
    rank: StrictInt | None = Field(
        default=None, ge=1, description="rank that the factors of such an adapter are cut to; else the sum of the ranks"
    )
    shard_size: Size = Field(default=None, description="largest shard, as 5GB, 256MiB or bytes")
    layers: LayerPattern | None = Field(
        default=None, description="how names in layers begin, as `backbone.stage_{layer}.`; else the common ones"
    )
    storage: dict[UrlPrefix, StorageEntry] = Field(
        default={}, description="options by URL prefix; the longest matching prefix wins"
    )
    side_files_from: Location | None = Field(default=None, description="the model whose side files are taken")
    copy_tokenizer: StrictBool = Field(default=True, description="whether tokenizer and chat template are copied")
    accept: tuple[RemarkCode, ...] = Field(default=(), description="codes of refusals that are only warnings here")
    rules: tuple[Rule, ...] = Field(
        default=(), max_length=2000, description="exceptions by tensor name; the first match wins"
    )
