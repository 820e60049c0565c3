"""What commands share: arguments, options made of settings, how they tell of their progress and print their answer."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, TypeVar, get_args

import typer

from stockflow.cli.exits import UnheardError, exit_codes, say, tell, write
from stockflow.errors import EXIT_BUG, EXIT_USER, PlanError, RecipeError, StockflowError, UserError
from stockflow.settings import Setting, checked, choices_of, flag_of, settings_of
from stockflow.text.redaction import redact

if TYPE_CHECKING:
    from stockflow.events import OnEvent

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML recipe: a file, a URL, or - for standard input.")
]
OutputArgument = Annotated[
    str, typer.Argument(metavar="OUTPUT", help="Folder or URL (s3://, gs://, az://) of the output.")
]
StorageRecipe = Annotated[
    str | None, typer.Option("--recipe", help="Recipe whose storage options apply (endpoints, anonymous access).")
]


def check_order(recipe: str, output: str) -> None:
    """Refuse a recipe in the place of the output.

    Raises:
        RecipeError: only OUTPUT looks like a recipe.
    """
    suffixes = (".yaml", ".yml")
    if output.endswith(suffixes) and not (recipe.endswith(suffixes) or recipe == "-" or os.path.isfile(recipe)):
        raise RecipeError(f"RECIPE and OUTPUT changed places: {redact(output)} looks like the recipe; name it first")


class Logging(TypedDict, total=False):
    """How lines on standard error are written."""

    log_format: Annotated[Literal["text", "json"], Setting(
        "json: everything on standard error is one JSON object per line, with time, level, message and the ids of "
        "run, plan, shard and worker.", "text", rank=2,
    )]  # fmt: skip
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Setting(
        "Least level of lines: debug tells of each shard, warning of what goes wrong.", "info", rank=2
    )]  # fmt: skip


class Serving(TypedDict, total=False):
    """What others may read while it runs."""

    metrics_port: Annotated[int | None, Setting(
        "Serve Prometheus metrics at /metrics while it runs; 0 takes a port that is free and says which.",
        metavar="PORT", least=0, most=65535, rank=2,
    )]  # fmt: skip


class Saying(TypedDict, total=False):
    """How a command that may take long tells of it, and prints its answer."""

    progress: Annotated[Literal["auto", "plain", "rich", "lanes", "json", "none"], Setting(
        "On standard error. auto: rich on a terminal, else plain lines; lanes: rich with a line per worker; "
        "json: one object per line, for programs.", "auto", rank=2,
    )]  # fmt: skip
    quiet: Annotated[bool, Setting("Print errors only.", False, rank=2)]
    as_json: Annotated[bool, Setting("Print the result as JSON on standard output.", False, flag="--json", rank=2)]


@dataclass(frozen=True)
class Told:
    """Whom a command tells how it goes, and how its answer is wanted."""

    on_event: "OnEvent"
    quiet: bool
    as_json: bool

    @property
    def speaks(self) -> bool:
        """Whether words are wanted on standard output."""
        return not (self.quiet or self.as_json)


@dataclass(frozen=True)
class Answer:
    """What a command prints, and how it exits."""

    words: Callable[[], object]
    json_parts: Callable[[], Iterable[str]]
    code: int = 0
    insists: bool = False
    """whether ``--quiet`` does not keep it from speaking"""
    is_kept: bool = False
    """whether what was done is there, whoever hears of it"""
    asides: Sequence[str] = ()
    """lines for standard error, whatever is printed"""


_Command = TypeVar("_Command", bound=Callable[..., None])


def facts_of(found: Any) -> Callable[[], Iterable[str]]:
    """Return what makes JSON of a result."""
    return lambda: (json.dumps(found.facts(), indent=1), "\n")


def command(
    *kinds: type,
    without: Sequence[str] = (),
    defaults: Mapping[str, object] | None = None,
    delays: bool = True,
    resumes: bool = False,
    tells_itself: bool = False,
) -> Callable[[Callable[..., Answer]], Callable[..., None]]:
    """Return a decorator that makes a command of a function from arguments, settings and ``told`` to an answer.

    Args:
        kinds: TypedDicts whose settings it takes as options.
        without: names among them that it does not take.
        defaults: where they are others than everywhere.
        delays: whether what takes little time shows no progress.
        resumes: whether a signal ends it by an error, so that what it began is left in order.
        tells_itself: whether what it says on standard output is progress enough.
    """

    def decorate(function: Callable[..., Answer]) -> Callable[..., None]:
        @options(*kinds, Saying, without=without, defaults=defaults)
        @wraps(function)
        def run(**given: Any) -> None:
            said = {name: given.pop(name) for name in settings_of(Saying, Logging, Serving) if name in given}
            if tells_itself and said["progress"] == "auto" and not (said["quiet"] or said["as_json"]):
                said["progress"] = "none"
            with _told(said, delays=delays, resumes=resumes) as told, _refused_in_json(told):
                answer = function(**given, told=told)
            try:
                _print(answer, told)
            except UnheardError as error:
                tell(f"stockflow: {error}")
                raise typer.Exit(answer.code or (0 if answer.is_kept else EXIT_USER)) from None
            for aside in answer.asides:
                tell(aside)
            if answer.code:
                raise typer.Exit(answer.code)

        return run

    return decorate


def options(
    *kinds: type, without: Sequence[str] = (), defaults: Mapping[str, object] | None = None
) -> Callable[[_Command], _Command]:
    """Return a decorator: a function of ``**settings`` becomes a command with an option for each; it exits by kind."""
    others = defaults or {}
    settings = {name: found for name, found in settings_of(*kinds).items() if name not in without}
    for name in others:
        declared, setting = settings[name]
        settings[name] = declared, replace(setting, help=setting.help.partition(" Default: ")[0])

    def decorate(function: _Command) -> _Command:
        @wraps(function)
        def run(**given: Any) -> None:
            with exit_codes():
                for name, (declared, setting) in settings.items():
                    given[name] = _read(flag_of(name, setting), declared, setting, given[name])
                function(**given)

        own = [
            each.replace(kind=Parameter.KEYWORD_ONLY)
            for each in signature(function, eval_str=True).parameters.values()
            if each.kind is not Parameter.VAR_KEYWORD and each.name != "told"
        ]
        shown = [
            _option(name, declared, setting, others.get(name, setting.default))
            for name, (declared, setting) in settings.items()
        ]
        parameters = [*own, *shown]
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run  # type: ignore[return-value]

    return decorate


def _read(flag: str, declared: Any, setting: Setting, given: Any) -> Any:
    """Return a value as functions take it, after a look at it; texts stay texts."""
    if setting.repeats and given is None:
        return setting.default
    value = checked(flag, declared, setting, given)
    return given if isinstance(given, str) else value


def _option(name: str, declared: Any, setting: Setting, default: object) -> Parameter:
    """Return the parameter of a function of which typer makes an option."""
    kind = declared
    if setting.repeats:
        kind, default = list[str] | None, None
    elif str in get_args(declared) and not choices_of(declared):
        kind = str | None
    bounds = {"min": setting.least, "max": setting.most} if {int, float} & {declared, *get_args(declared)} else {}
    option = typer.Option(flag_of(name, setting), metavar=setting.metavar, help=setting.help, **bounds)  # type: ignore[arg-type]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


@contextmanager
def _refused_in_json(told: Told) -> Iterator[None]:
    """With ``--json`` say on standard output, too, why there is no answer: the error, and what a plan remarked."""
    from stockflow.text.records import as_plain

    try:
        yield
    except StockflowError as error:
        if told.as_json:
            facts = {"type": type(error).__name__, "exit_code": error.exit_code, "message": str(error)}
            remarks = error.remarks if isinstance(error, PlanError) else ()
            with suppress(UnheardError, BrokenPipeError):
                write([json.dumps({"error": facts, "remarks": [as_plain(each) for each in remarks]}, indent=1), "\n"])
        raise


def _print(answer: Answer, told: Told) -> None:
    if told.as_json:
        write(answer.json_parts())
    elif answer.insists or not told.quiet:
        say(answer.words())


@contextmanager
def _told(said: Mapping[str, Any], *, delays: bool, resumes: bool) -> Iterator[Told]:
    from stockflow.interruption import interruptible
    from stockflow.progress.display import DELAY_S

    with ExitStack() as stack:
        shown = stack.enter_context(with_progress(said, delay_s=DELAY_S if delays else 0.0))
        # Within: it would turn the exit that `with_progress` makes of a signal into an error again.
        stack.enter_context(interruptible() if resumes else nullcontext())
        on_event = stack.enter_context(with_metrics(said.get("metrics_port"), shown))
        yield Told(on_event, said["quiet"], said["as_json"])


@contextmanager
def with_progress(said: Mapping[str, Any], *, delay_s: float = 0.0) -> "Iterator[OnEvent]":
    """Provide who is told of events and shows them; what takes less than ``delay_s`` shows nothing.

    With ``--progress json`` and ``--log-format json`` standard error has nothing but JSON, the message of an error in
    its last object.

    Raises:
        UserError: progress and logs are asked for in two forms.
    """
    from stockflow.progress.display import reporting

    progress, quiet, log_format = said["progress"], said["quiet"], said.get("log_format", "text")
    is_logged = log_format == "json"
    if is_logged and progress in ("rich", "lanes", "json"):
        raise UserError(f"--log-format json and --progress {progress} exclude each other: leave one of them out")
    style: Any = "none" if quiet else progress
    level: Any = "error" if quiet else said.get("log_level", "info")
    try:
        with reporting(style, delay_s=delay_s, log_format=log_format, level=level) as on_event:
            yield on_event
    except StockflowError as error:
        if is_logged or style == "json":
            raise typer.Exit(error.exit_code) from None
        raise
    except Exception as error:
        if is_logged and not isinstance(error, typer.Exit | typer.Abort | BrokenPipeError):
            raise typer.Exit(EXIT_BUG) from None  # the traceback is in the last line
        raise


@contextmanager
def with_metrics(port: int | None, on_event: "OnEvent") -> "Iterator[OnEvent]":
    """Provide who is told of events, counts them for whoever scrapes ``port``, and passes them on.

    Raises:
        UserError: the port cannot be had.
    """
    if port is None:
        yield on_event
        return
    from stockflow.events import Note, all_of
    from stockflow.progress.metrics import Metrics, served

    metrics = Metrics()
    with served(metrics, port) as bound:
        if not port:
            on_event(Note(f"metrics at http://{os.uname().nodename}:{bound}/metrics"))
        yield all_of(metrics, on_event)
