"""A checkpoint at a URL: its tensors and where their bytes lie, its files and their stamps.

Index, headers and a few values are read. The layout is Hugging Face's: one ``model.safetensors`` (or
``pytorch_model.bin``), or shards named by an index.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from stockflow.checkpoints.adapters.adapted import adapted
from stockflow.checkpoints.adapters.bases import on_base
from stockflow.checkpoints.adapters.files import remarks_on_files
from stockflow.checkpoints.adapters.ground import Ground
from stockflow.checkpoints.adapters.keys import place_of
from stockflow.checkpoints.adapters.names import BaseNames, unwrapped
from stockflow.checkpoints.adapters.opening import WithBase, base_named, read_adapter
from stockflow.checkpoints.adapters.unfused import PlainTensors, with_experts_apart
from stockflow.checkpoints.beside.side_files import is_tokenizer_or_template
from stockflow.checkpoints.beside.sorting import look_beside
from stockflow.checkpoints.files.candidates import chosen_of, groups_of
from stockflow.checkpoints.files.chunks import is_distributed, read_distributed
from stockflow.checkpoints.files.documents import find_json, read_json
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.files.layout import Extent, HeaderCache, OnFile, Pieces, unheard
from stockflow.checkpoints.files.parts import on_siblings
from stockflow.checkpoints.files.tree import MANIFEST_FILE, RECORDS_FOLDER, Tree, list_tree
from stockflow.checkpoints.folders import no_folder, nothing_here
from stockflow.checkpoints.heads import with_tie_flag
from stockflow.checkpoints.modules import MODULES_FILE, ROUTER_FILE, Modules, find_modules
from stockflow.checkpoints.packed import UNPACKED, PackedWeights, packed_weights
from stockflow.checkpoints.pipelines import PIPELINE_FILE, find_pipeline, pipeline_remark
from stockflow.checkpoints.quantised import Stored, Tensors, hints_of, sized_by, tensors_of
from stockflow.checkpoints.scale_rules import by_kind, find_rules
from stockflow.checkpoints.values import NOTHING_READ, KnownValues, as_numbers, read_values
from stockflow.checkpoints.weights import Folder, IsSettled, Weights, read_weights
from stockflow.errors import CheckpointError, LinkError, NotFoundError, StockflowError, StorageError, UserError
from stockflow.storage import JoinedStore, Listing, LocalStore, Stamp, Store, key_of_adapter
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown

CONFIG_FILE = "config.json"

MAX_CONFIG_BYTES = 16_000_000
MAX_LINKS_SAID = 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is known of a checkpoint from its index and headers."""

    url: str
    specs: Mapping[str, TensorSpec]
    """by name, in on-disk order: files by name, tensors by offset; what is quantised as the numbers it stands for"""
    extents: Mapping[str, Extent]
    """of all tensors that lie there; of a quantised one, where its codes do"""
    files: Mapping[str, Stamp]
    """the weight files and the index"""
    config: Mapping[str, object] | None
    """config.json, if there is one"""
    side_files: Mapping[str, Stamp]
    """the files that a loader needs besides the weights: tokenizer, templates, code that configs name"""
    omitted_side_files: tuple[str, ...]
    """the ones that are too large to be copied, or whose names not every store takes beside the others"""
    remarks: tuple[Remark, ...] = ()
    """what was found of it alone"""
    other_files: tuple[str, ...] = ()
    """what else lies there and is of no known kind; hidden files and what an output has of its own left out"""
    missing_files: tuple[str, ...] = ()
    """code and folders of modules that its configs name and that are not there"""
    values: KnownValues = NOTHING_READ
    """what was read of its tensors"""
    settled: frozenset[str] = frozenset()
    """names of which files and index disagree, and that rules say it need not hold"""
    over_http: bool = False
    """whether its bytes travel without TLS"""
    stored: Mapping[str, Stored] = field(default_factory=dict)
    """the tensors that are quantised"""
    joined: Mapping[str, Pieces] = field(default_factory=dict)
    """the tensors that lie in several runs of bytes, one after the other"""
    static_scales: Mapping[str, TensorSpec] = field(default_factory=dict)
    """fixed scales of activations"""
    factors: Mapping[str, bytes] = field(default_factory=dict)
    """some numbers of the factors of an adapter, by key"""
    rules: Mapping[str, str] = field(default_factory=dict)
    """how scales follow from weights, by kind of tensor, where the data says so"""
    predicts: str = ""
    """of a component of a pipeline: what the scheduler beside it takes for its output; empty: nobody says"""


Settles = Callable[[int, str], bool]
"""Whether rules say of a tensor that the checkpoint of this position need not hold it."""


def open_checkpoint(
    store: Store, cache: HeaderCache, on_file: OnFile = unheard, is_settled: IsSettled = lambda name: False
) -> Checkpoint:
    """Read the index and the headers of the checkpoint in ``store``, and those of its adapter if that is named.

    Raises:
        NotFoundError: there is no checkpoint at this location.
        CheckpointError: index, headers or config are malformed.
    """
    if isinstance(store, JoinedStore):
        return _with_adapter(_opened(store.model, cache, on_file, is_settled), store, cache, on_file)
    if isinstance(store, LocalStore) and os.path.isfile(store.where()) and (said := no_folder(store.where())):
        raise NotFoundError(said)
    listing = _with_named(store, store.listing())
    only = store.only
    tree = _tree(store, listing)
    modules = _modules(store, tree)
    group = None if modules.document else chosen_of(groups_of(listing.files, only), only)
    is_in_shards = group is None and not modules.weights and not only and is_distributed(listing.files)
    if group is None and not modules.weights and not is_in_shards:
        raise NotFoundError(nothing_here(store, listing.files, listing.folders))
    config = read_json(store, CONFIG_FILE, MAX_CONFIG_BYTES) if CONFIG_FILE in tree.files else None
    settled: set[str] = set()

    def is_known(name: str) -> bool:
        settled.update([name] if is_settled(name) else [])
        return name in settled

    folder = Folder(store, tree.files, config, cache, on_file, is_known)
    weights = read_distributed(folder) if is_in_shards else read_weights(folder, group, modules.weights)
    beside = look_beside(store, tree, modules, config, weights.specs.keys(), weights.files.keys())
    values = read_values(store, weights.in_one_run, config, cache)
    tensors = _tensors(weights, values, config, cache, store.where())
    return Checkpoint(
        url=store.url,
        specs=tensors.specs,
        extents=cache.found(_extents, weights.extents, tensors),
        files=weights.files,
        config=config,
        side_files=beside.copied,
        omitted_side_files=beside.omitted,
        remarks=(
            *weights.remarks,
            *beside.remarks,
            *_on_pipeline(modules, store),
            *_on_unfinished(listing, store),
            *on_siblings(store, listing.files),
        ),
        other_files=beside.others,
        missing_files=beside.missing,
        values=values,
        stored=tensors.stored,
        joined=weights.joined,
        static_scales=tensors.static_scales,
        rules=find_rules(store, weights.files, weights.extents, cache.found(by_kind, tensors.stored)),
        settled=frozenset(settled),
        over_http=store.over_http,
    )


def _completed(
    store: Store, cache: HeaderCache, on_file: OnFile, is_settled: IsSettled, with_base: WithBase | None
) -> Checkpoint:
    """Return the checkpoint in ``store``; of an adapter alone, that of the base which it names, with it."""
    try:
        return _opened(store, cache, on_file, is_settled)
    except NotFoundError as error:
        if with_base is None or isinstance(store, JoinedStore) or (base := base_named(store)) is None:
            raise error from None
    found = open_checkpoint(with_base(store, base), cache, on_file, is_settled)
    text = f"{store.where()} holds an adapter: it is merged as {found.url}, whose base adapter_config.json names"
    return replace(found, remarks=(*found.remarks, Remark("adapter-base", text, "note", (found.url,))))


def _opened(store: Store, cache: HeaderCache, on_file: OnFile, is_settled: IsSettled) -> Checkpoint:
    """Return the checkpoint in ``store``, read once for all adapters on it; what was found of it is said once."""
    found, is_first = cache.once(store.url, lambda: open_checkpoint(store, cache, on_file, is_settled))
    return found if is_first else replace(found, remarks=())


def _with_adapter(base: Checkpoint, store: JoinedStore, cache: HeaderCache, on_file: OnFile) -> Checkpoint:
    """Return a checkpoint with what an adapter makes of it; what is equal of both is one object."""
    if base.joined:
        raise CheckpointError(f"{base.url} has tensors in shards, to which no adapter is added; make safetensors of it")
    adapter = read_adapter(store.adapter, cache, on_file)
    names, modules = cache.found(BaseNames, base.specs), {place_of(key).module for key in adapter.specs}
    _check_packed(base, cache.found(packed_weights, base.specs), modules)
    apart = with_experts_apart(PlainTensors(base.specs, base.extents), names, base.stored, modules)
    if apart.specs is not base.specs:
        base, names = replace(base, specs=apart.specs, extents=apart.extents), BaseNames(apart.specs)
    made = adapted(Ground(store.model.where(), base.specs, base.stored, names, base.config), adapter)
    store.take_from_adapter(adapter.tokenizer)
    store.check_links(adapter.tokenizer)
    parted = {head: base.extents[name] for head, name in made.parted.items()}
    extents = {**base.extents, **parted, **{key_of_adapter(key): extent for key, extent in adapter.extents.items()}}
    return replace(
        base,
        url=store.url,
        specs={**base.specs, **made.specs} if made.specs else base.specs,
        extents={**extents, **{name: extents[each.parts[0].name] for name, each in made.stored.items()}},
        files={**base.files, **adapter.files},
        side_files={**_without_tokenizer(base.side_files, adapter.tokenizer), **adapter.tokenizer},
        config=with_tie_flag(base.config, False) if made.unties and base.config is not None else base.config,
        stored={**base.stored, **made.stored},
        factors={key: sample.payload for key, sample in adapter.samples.items()},
        remarks=(
            *base.remarks,
            *on_base(store, adapter.config.base),
            *made.remarks,
            *adapter.remarks,
            *remarks_on_files(store, adapter, base.side_files),
        ),
    )


def _check_packed(base: Checkpoint, packed: Sequence[PackedWeights], modules: Collection[str]) -> None:
    """Refuse to add anything to weights whose codes are not read."""
    adapted_names = set(map(unwrapped, modules))
    for each in packed:
        if name := next((code for code in each.codes if unwrapped(code.rpartition(".")[0]) in adapted_names), None):
            raise CheckpointError(
                f"{base.url} holds {each.format} weights, such as {shown(name)}, to which no adapter is added. "
                f"{UNPACKED}"
            )


def _without_tokenizer(files: Mapping[str, Stamp], instead: Mapping[str, Stamp]) -> dict[str, Stamp]:
    """Return what lies beside a model without its own tokenizer, if there is another one in its place."""
    kept = (key for key in files if not instead or "/" in key or not is_tokenizer_or_template(key))
    return {key: files[key] for key in kept}


def open_tokenizer(store: Store) -> Checkpoint:
    """Read which files of a tokenizer a model has; its weights are not looked at.

    Raises:
        NotFoundError: it has none.
    """
    files = list_tree(store, store.listing()).files
    found = {key: stamp for key, stamp in files.items() if is_tokenizer_or_template(key)}
    if not found:
        raise NotFoundError(f"{store.where()} has no tokenizer: expected tokenizer.json, or an older form of one")
    return Checkpoint(store.url, {}, {}, files=found, config=None, side_files=found, omitted_side_files=())


def _tensors(
    weights: Weights, values: KnownValues, config: Mapping[str, object] | None, cache: HeaderCache, where: str
) -> Tensors:
    """Return the tensors of a checkpoint as the numbers they stand for; equal checkpoints share them."""
    shapes = {
        spec.name: shape
        for spec in cache.found(sized_by, weights.specs)
        if (shape := _shape_of(values.data.get(weights.extents[spec.name], b""), spec.dtype)) is not None
    }
    hints = hints_of(config)
    tensors = cache.shared(
        (id(weights.specs), hints, tuple(shapes.items())), lambda: tensors_of(weights.specs, hints, shapes, where)
    )
    for name, stored in tensors.stored.items() if weights.joined else ():
        if any(part.name in weights.joined for part in (*stored.parts, *stored.beside)):
            raise CheckpointError(f"{where}: {shown(name)} is quantised and in shards, which is not read; join them")
    if split := [name for name in tensors.static_scales if name in weights.joined]:
        raise CheckpointError(f"{where}: {shown(split[0])} is a scale in shards, which is not read; join them")
    return tensors


@lru_cache
def _shape_of(payload: bytes, dtype: str) -> tuple[int, ...] | None:
    """Return a shape that is stored as a tensor: one of thousands that are equal."""
    numbers = as_numbers(payload, dtype)
    return None if numbers is None else tuple(map(int, numbers))


def _extents(extents: Mapping[str, Extent], tensors: Tensors) -> Mapping[str, Extent]:
    """Where the tensors begin, what is stored in parts with the first of them."""
    if not tensors.stored:
        return extents
    return {**extents, **{name: extents[each.parts[0].name] for name, each in tensors.stored.items()}}


def _on_unfinished(listing: Listing, store: Store) -> Iterator[Remark]:
    if RECORDS_FOLDER in listing.folders and MANIFEST_FILE not in listing.files:
        text = (
            f"{store.where()} is the output of a merge that has not finished: it has records in {RECORDS_FOLDER}/ and "
            f"no {MANIFEST_FILE}, which comes last; run that merge again to its end"
        )
        yield Remark("unfinished-output", text, "refusal", (store.url,))


def _on_pipeline(modules: Modules, store: Store) -> Iterator[Remark]:
    if modules.document:
        yield pipeline_remark(modules, store.where())


def _modules(store: Store, tree: Tree) -> Modules:
    """Return the parts of a model that have folders of their own; of a file that was named alone, no pipeline's."""
    pipeline = None
    if not store.only:
        pipeline = find_pipeline(tree, _document(store, tree, PIPELINE_FILE), store.where())
    documents = {key: _document(store, tree, key) for key in (MODULES_FILE, ROUTER_FILE)}
    return pipeline or find_modules(tree, documents, store.url)


def _with_named(store: Store, listing: Listing) -> Listing:
    """Return a listing with the one file of weights that was named: what has files need not list them."""
    if not store.only or store.only in listing.files:
        return listing
    with suppress(NotFoundError):
        return replace(listing, files={**listing.files, store.only: store.stamp(store.only)})
    return listing


def _tree(store: Store, listing: Listing) -> Tree:
    """Return what lies with a model; one file of weights that was named has neither other models nor their folders."""
    only = store.only
    if not only:
        return list_tree(store, listing)
    is_in_a_folder_of_its_own = not {CONFIG_FILE, MODULES_FILE}.isdisjoint(listing.files)
    tree = list_tree(store, listing) if is_in_a_folder_of_its_own else Tree(listing.files)
    singles = {group.single for group in groups_of(list(listing.files), only="")} - {only, ""}
    return replace(tree, files={key: stamp for key, stamp in tree.files.items() if key not in singles})


def _document(store: Store, tree: Tree, key: str) -> object:
    return find_json(store, key, MAX_CONFIG_BYTES) if key in tree.files else None


def open_checkpoints(
    stores: Sequence[Store | StockflowError],
    on_file: OnFile = unheard,
    settles: Settles | None = None,
    with_base: WithBase | None = None,
) -> list[Checkpoint]:
    """Open several checkpoints, the first one first and the others concurrently, in the order given.

    Args:
        stores: where they are, or why that cannot be told.
        on_file: told of each file whose header was read.
        with_base: finds the base of an adapter that was named alone.
        settles: what rules settle. With it, refusals are left to who makes a plan of these; without it they are raised.

    Raises:
        UserError: what ``open_checkpoint`` raises, of all of them at once.
        StorageError: reading failed after retries, and nothing else is wrong.
    """
    cache = HeaderCache()

    def attempt(position: int, failed: object = None) -> Checkpoint | StockflowError:
        store = stores[position]
        if isinstance(store, StockflowError):
            return store
        if isinstance(failed, StorageError) and not isinstance(store, LocalStore):
            return failed  # which may take a minute to find out
        try:
            return _completed(store, cache, on_file, partial(settles or _settles_nothing, position), with_base)
        except (UserError, StorageError) as error:
            return error

    first = [attempt(position) for position in range(len(stores))[:1]]  # fills the cache for the others
    with ThreadPoolExecutor(max(len(stores), 1)) as pool:
        found = first + list(pool.map(partial(attempt, failed=next(iter(first), None)), range(1, len(stores))))
    errors = [each for each in found if isinstance(each, StockflowError)]
    if settles is None:
        refusals = (remark for each in found if isinstance(each, Checkpoint) for remark in each.remarks)
        refusals = (remark for remark in refusals if remark.severity == "refusal")
        errors += [CheckpointError(str(remark)) for remark in refusals]
    if errors:
        raise _together(errors)
    return [each for each in found if isinstance(each, Checkpoint)]


def link_notes(store: Store, files: Iterable[str]) -> Iterator[str]:
    """Yield which of a checkpoint's files lie where only ``--follow-links`` lets them be read."""
    if not isinstance(store, LocalStore):
        return
    strays = [(file, real) for file in sorted(files) if (real := store.links.stray(file))]
    for file, real in strays[:MAX_LINKS_SAID]:
        yield f"{store.where(file)} is read from {real!r}, where its link leads (--follow-links)"
    if len(strays) > MAX_LINKS_SAID:
        yield f"... and so are {len(strays) - MAX_LINKS_SAID} more files of {store.where()}"


def _settles_nothing(position: int, name: str) -> bool:
    return False


def _together(errors: Sequence[StockflowError]) -> StockflowError:
    """Return one error for all of them; of what stands in the way to a store, such as credentials, the first one."""
    own = [error for error in errors if isinstance(error, NotFoundError | CheckpointError | LinkError)]
    others = [error for error in errors if error not in own]
    if len(errors) == 1 or not own:
        return errors[0]
    kind = NotFoundError if all(isinstance(error, NotFoundError) for error in errors) else CheckpointError
    lines = "\n  ".join(dict.fromkeys(map(str, [*own, *others[:1]])))
    return kind(f"{len(errors)} models cannot be opened:\n  {lines}")
