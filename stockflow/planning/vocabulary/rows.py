"""The output's vocabulary: its tokens, and for every model which row is which token's. Pure.

Tokens are told apart by their strings. A model that lacks one takes a default row for it: what the recipe says, else
the row of the only model that has it, else the base's, else the mean of those that have it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from stockflow.checkpoints.decodes.stored import RowFill, RowRun, RowRuns, plain
from stockflow.checkpoints.heads import tied_names
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.tokens.reading import Vocabulary
from stockflow.checkpoints.tokens.token_rows import vocabulary_tensors
from stockflow.checkpoints.tokens.tokenizers import Tokenizer
from stockflow.checkpoints.tokens.vocabularies import FAST, Ids
from stockflow.errors import PlanError
from stockflow.methods.parameters import Parameters
from stockflow.planning.job import TensorJob, merging
from stockflow.recipe import Recipe
from stockflow.recipe.tokens import TokenEntry
from stockflow.storage import redact
from stockflow.text.remarks import Remark
from stockflow.text.sizes import counted
from stockflow.text.strictjson import shown

NUM_VALUES = 20
"""tokens in what programs read"""
ROWS_PER_SPARE = 16
"""Of a vocabulary: padding and what only an embedding or a head has are fewer rows than one in so many."""
_COLUMN_PER_TOKEN = "final_logits_bias"
ALONE = Parameters({"normalize": True}, {"weight": (1.0,)})
"""of `linear`: the rows of one model as they are"""


@dataclass(frozen=True, slots=True)
class Default:
    """Where the row of a token comes from that a model lacks, or that every model is to take."""

    of: tuple[int, ...]
    """checkpoints whose mean it is; none: zeros"""
    is_forced: bool
    row: int | None = None
    """in the one checkpoint that gives it"""


@dataclass(frozen=True)
class OutputVocabulary:
    """The vocabulary that is written, and the rows of every model."""

    ids: Ids
    """what every token's row is"""
    num_rows: int
    """one per id, and padding"""
    source: int
    """checkpoint whose tokenizer it is, or was added to"""
    added: Ids
    """the tokens that it lacks"""
    tensors: frozenset[str]
    """that have a row per token"""
    own: Sequence[Ids]
    """of each checkpoint: its ids, those without a row left out"""
    spare: Sequence[frozenset[int]]
    """of each checkpoint: its rows that are no token's, such as padding"""
    rows_of: Sequence[int]
    """how many rows each checkpoint has"""
    defaults: Mapping[str, Default]
    """of tokens that the recipe names"""
    base: int | None
    """the checkpoint that the recipe calls the base, if it does"""
    _maps: dict[tuple[int, ...], tuple[RowRuns, ...]] = field(default_factory=dict)

    def reshaped(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return a checkpoint whose tensors have the rows of the output."""
        specs = dict(checkpoint.specs)
        for name in self.tensors & specs.keys():
            specs[name] = specs[name]._replace(shape=(self.num_rows, *specs[name].shape[1:]))
        return replace(checkpoint, specs=specs)

    def mapped(self, job: TensorJob) -> TensorJob:
        """Return a job that takes its rows by token; what is copied is merged of one model, byte for byte."""
        output = job.output
        if output.name not in self.tensors:
            return job
        maps = self.maps(tuple(operand.checkpoint for operand in job.reading.operands))
        operands = tuple(each._replace(rows=rows) for each, rows in zip(job.reading.operands, maps, strict=True))
        result = job.result
        if not job.is_copy:
            return merging(output, operands, result.method, result.parameters, job.reading.scope)
        alone = operands[0]._replace(decode=plain(output.dtype))
        return merging(output, (alone,), "linear", ALONE, "tensor")

    def maps(self, models: tuple[int, ...]) -> tuple[RowRuns, ...]:
        """Return the rows of each of the models that are read together."""
        if models not in self._maps:
            self._maps[models] = tuple(self._map(models, place) for place in range(len(models)))
        return self._maps[models]

    def _map(self, models: tuple[int, ...], place: int) -> RowRuns:
        runs: list[RowRun] = []
        fills: list[RowFill] = []
        tokens = {row: token for token, row in self.ids.items()}
        for row in range(self.num_rows):
            token = tokens.get(row)
            default = self.defaults.get(token) if token is not None else None
            stored = self._stored(token, row, models[place])
            if default is not None and (default.is_forced or stored is None):
                stored = default.row if default.of == (models[place],) else None
            if stored is not None:
                _extend(runs, stored, row)
            elif of := self._having(token, row, models, default):
                _fill(fills, row, of)
        return RowRuns(self.rows_of[models[place]], tuple(runs), tuple(fills))

    def _stored(self, token: str | None, row: int, model: int) -> int | None:
        """Return a model's own row of a token, or that of padding: the one of equal number that is no token's there."""
        if token is not None:
            return self.own[model].get(token)
        return row if row in self.spare[model] else None

    def _having(self, token: str | None, row: int, models: tuple[int, ...], default: Default | None) -> tuple[int, ...]:
        """Return the places of the models whose mean the default of a row is."""
        if default is not None and not set(default.of) <= set(models):
            raise PlanError(f"`tokenizer.tokens` takes the row of {shown(token)} from a model that is not merged there")
        if default is not None:
            return tuple(models.index(model) for model in default.of)
        having = tuple(place for place, model in enumerate(models) if self._stored(token, row, model) is not None)
        of_base = tuple(place for place in having if models[place] == self.base)
        return of_base or having


def _extend(runs: list[RowRun], own: int, row: int) -> None:
    """Add a row to the last run, or begin one."""
    if runs and runs[-1].stop == own and runs[-1].to + runs[-1].stop - runs[-1].start == row:
        runs[-1] = runs[-1]._replace(stop=own + 1)
    else:
        runs.append(RowRun(own, own + 1, row))


def _fill(fills: list[RowFill], row: int, of: tuple[int, ...]) -> None:
    if fills and fills[-1].stop == row and fills[-1].of == of:
        fills[-1] = fills[-1]._replace(stop=row + 1)
    else:
        fills.append(RowFill(row, row + 1, of))


def rows_of_zeros(vocabulary: OutputVocabulary | None, jobs: Sequence[TensorJob]) -> Iterator[Remark]:
    """Yield the tensors in which rows are zeros: padding, and tokens that only models have which it is not made of."""
    if vocabulary is None:
        return
    asked = {token for token, default in vocabulary.defaults.items() if not default.of}
    known = {token for own in vocabulary.own for token in own} - asked
    tokens = {row: token for token, row in vocabulary.ids.items()}
    for job in jobs:
        if job.output.name not in vocabulary.tensors:
            continue
        bare = _rows_of_nobody(job, vocabulary.num_rows)
        lacking = {tokens[row]: str(row) for row in bare if tokens.get(row) in known}
        if lacking:
            have = "has" if len(lacking) == 1 else "have"
            text = (
                f"{counted(len(lacking), 'token')} such as {shown(next(iter(lacking)))} {have} a row of zeros in "
                f"{shown(job.output.name)}: no model that it is made of has one"
            )
            values = dict(islice(lacking.items(), NUM_VALUES))
            yield Remark("tokens-missing", text, tensors=(job.output.name,), values=values)
        if padding := [row for row in bare if row not in tokens]:
            text = (
                f"{counted(len(padding), 'row')} of padding in {shown(job.output.name)} such as {padding[0]:,} are "
                "zeros, as no model has them: their ids have a logit of 0, which wins where all others are negative"
            )
            yield Remark("padding-of-zeros", text, "note", tensors=(job.output.name,))


def _rows_of_nobody(job: TensorJob, num_rows: int) -> list[int]:
    covered = bytearray(num_rows)
    for rows in (operand.rows for operand in job.reading.operands if operand.rows):
        for run in rows.runs:
            covered[run.to : run.to + run.stop - run.start] = b"\1" * (run.stop - run.start)
        for fill in rows.fills:
            covered[fill.start : fill.stop] = b"\1" * (fill.stop - fill.start)
    return [row for row, has_model in enumerate(covered) if not has_model]


def unlike_rows(jobs: Sequence[TensorJob]) -> Iterator[str]:
    """Yield that embedding and head of a stack, which come from several models, have rows for several vocabularies."""
    names = tied_names(job.output.name for job in jobs)
    found = {
        job.output.name: job.output.shape[0] for job in jobs if job.output.name in {*names.heads, *names.embeddings}
    }
    if len(set(found.values())) > 1:
        said = " and ".join(f"{number:,} in {shown(name)}" for name, number in found.items())
        yield f"rows are for several vocabularies: {said}; `tokenizer_source: union`, or a model, makes them one"


def rows_remedy(checkpoints: Sequence[Checkpoint], tokenizers: Sequence[Tokenizer]) -> str:
    """Return what to do where models have rows for different numbers of tokens: what a recipe can say, if it can."""
    layouts = {id(each.specs): each.specs for each in checkpoints}.values()
    if any(name.endswith(_COLUMN_PER_TOKEN) for specs in layouts for name in specs):
        return ""
    first = next((each.vocabulary for each in tokenizers[:1]), None)
    own = [each.vocabulary or first for each in tokenizers]
    if own and all(each and not each.problem and not each.numbering for each in own):
        has_fast = FAST in checkpoints[0].side_files
        return f"`tokenizer_source: base`{' or `union`' if has_fast else ''} merges rows by token"
    return "with the tokenizer.json of each model beside it, `tokenizer_source: base` merges rows by token"


def output_vocabulary(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], tokenizers: Sequence[Tokenizer]
) -> OutputVocabulary | None:
    """Return what the recipe's tokenizer asks for; None where it moves no row.

    Args:
        recipe: says whose tokens are written.
        checkpoints: in the order of its locations.
        tokenizers: theirs.

    Raises:
        PlanError: a tokenizer cannot be read, or a token is named that its model lacks.
    """
    if recipe.vocabulary is None or not tokenizers:
        return None
    vocabularies = [each.vocabulary or tokenizers[recipe.donor].vocabulary for each in tokenizers]
    wanted, source = recipe.vocabulary, recipe.vocabulary_donor
    rows = [each.num_rows for each in tokenizers[: len(recipe.checkpoints)]]
    tensors = vocabulary_tensors(checkpoints[recipe.donor].specs, rows[recipe.donor])
    agree = len(set(rows)) == 1 and all(each == vocabularies[0] for each in vocabularies)
    step = wanted.pad_to_multiple_of or 1
    if not tensors or (agree and not wanted.tokens and rows[0] % step == 0):
        return None
    ids = [_ids(checkpoint, each) for checkpoint, each in zip(checkpoints, vocabularies, strict=True)]
    union = (
        [ids[index] for index in dict.fromkeys((recipe.donor, *range(len(ids))))] if wanted.source == "union" else []
    )
    output, added = _numbered(ids[source], [*union, dict.fromkeys(wanted.tokens, 0)])
    own = [{token: each for token, each in model.items() if each < num} for model, num in zip(ids, rows, strict=False)]
    made = OutputVocabulary(
        ids=output,
        num_rows=-(-(max(output.values(), default=-1) + 1) // step) * step,
        source=source,
        added=added,
        tensors=frozenset(tensors),
        own=own,
        spare=[frozenset(range(num)) - set(each.values()) for each, num in zip(own, rows, strict=True)],
        rows_of=rows,
        defaults={token: _default(recipe, token, entry, own, rows) for token, entry in wanted.tokens.items()},
        base=recipe.checkpoints.index(recipe.base_model) if recipe.base_model else None,
    )
    _check_rows(made, checkpoints[: len(rows)])
    return made


def _numbered(source: Ids, others: Iterable[Ids]) -> tuple[dict[str, int], dict[str, int]]:
    """The ids of a source and behind them, in the order of theirs, of what others have besides; and these alone."""
    ids, added = dict(source), dict[str, int]()
    for tokens in others:
        for token in sorted(tokens.keys() - ids.keys(), key=lambda each: (tokens[each], each)):
            ids[token] = added[token] = max(ids.values(), default=-1) + 1
    return ids, added


def _ids(checkpoint: Checkpoint, vocabulary: Vocabulary | None) -> Ids:
    if vocabulary is None:
        raise PlanError(f"{redact(checkpoint.url)} has no tokenizer, and neither has the base: rows have no tokens")
    if vocabulary.problem or vocabulary.numbering:
        reason = vocabulary.problem or f"{vocabulary.numbering.partition('=')[0]} numbers the pieces of its model anew"
        raise PlanError(
            f"the tokens of {redact(checkpoint.url)} are not known: {reason}. Save it with a tokenizer.json: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return vocabulary.ids


def _default(recipe: Recipe, token: str, entry: TokenEntry, own: Sequence[Ids], rows: Sequence[int]) -> Default:
    if entry.source.model is None:
        return Default((), entry.force)
    index, where = recipe.checkpoints.index(entry.source.model), redact(entry.source.model)
    asked = token if entry.source.kind == "model" else entry.source.token
    row = entry.source.token_id if asked is None else own[index].get(asked)
    if row is None:
        raise PlanError(f"`tokenizer.tokens` takes the row of {shown(asked)} from {where}, which has no such token")
    if row >= rows[index]:
        raise PlanError(
            f"`tokenizer.tokens` takes row {row:,} for {shown(token)} from {where}, which has {rows[index]:,} rows"
        )
    kept = own[index].get(token, row)
    if kept != row and not entry.force and not all(token in each for each in own):
        raise PlanError(
            f"`tokenizer.tokens` takes another row for {shown(token)} from {where}, which has the token itself and "
            "keeps its own row: say `force: true`, or name another model"
        )
    return Default((index,), entry.force, row)


def _check_rows(made: OutputVocabulary, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse tensors with a row per token that are of another length than the embedding of their model."""
    for checkpoint, num_rows in zip(checkpoints, made.rows_of, strict=True):
        for name in sorted(made.tensors & checkpoint.specs.keys()):
            shape = checkpoint.specs[name].shape
            if shape[0] != num_rows:
                raise PlanError(
                    f"{shown(name)} has {shape[0]:,} rows in {redact(checkpoint.url)}, and the embedding there has "
                    f"{num_rows:,}; expected a row per token in both"
                )
        about_as_long = vocabulary_tensors(checkpoint.specs, num_rows, num_rows // ROWS_PER_SPARE)
        if others := [name for name in about_as_long if checkpoint.specs[name].shape[0] != num_rows]:
            found = checkpoint.specs[others[0]].shape[0]
            raise PlanError(
                f"{shown(others[0])} has {found:,} rows in {redact(checkpoint.url)} where a token has one of "
                f"{num_rows:,} in {shown(min(made.tensors))}: rows of both cannot be gathered by token; leave out "
                "`tokenizer_source`, and merge models of one tokenizer"
            )
        if strays := [name for name in checkpoint.specs if name.endswith(_COLUMN_PER_TOKEN)]:
            raise PlanError(f"{shown(strays[0])} has a column per token; only rows are gathered by token")
