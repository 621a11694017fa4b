"""The commands `p2pllm config …`: they check, show and translate configuration files."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pllm.cli_options import Settings

if TYPE_CHECKING:
    from rich.table import Table

    from p2pllm.config.unitedllm import Translation, Verdict

config_app = typer.Typer(
    help="Check, show and translate configuration files.", no_args_is_help=True
)


@config_app.command("check")
def config_check(
    file: Annotated[Path, typer.Argument(help="A run's or a peer's YAML file.")],
    settings: Settings = [],
) -> None:
    """Say whether a configuration file is valid, and its fingerprint.

    Example: p2pllm config check configs/demo.yaml
    """
    from p2pllm.config.load import load_either
    from p2pllm.config.run import RunConfig

    config = load_either(file, settings)
    if isinstance(config, RunConfig):
        typer.echo(f"{file} is a valid run configuration, fingerprint {config.fingerprint}")
    else:
        typer.echo(f"{file} is a valid peer configuration")


@config_app.command("show")
def config_show(
    file: Annotated[Path, typer.Argument(help="A run's or a peer's YAML file.")],
    settings: Settings = [],
) -> None:
    """Print a configuration with every default and every key's meaning.

    Example: p2pllm config show configs/demo.yaml --set rounds=20
    """
    from p2pllm.config.load import load_either, show
    from p2pllm.config.run import RunConfig

    config = load_either(file, settings)
    if isinstance(config, RunConfig):
        typer.echo(f"# fingerprint: {config.fingerprint}")
    typer.echo(show(config), nl=False)


@config_app.command("import-unitedllm")
def config_import_unitedllm(
    file: Annotated[Path, typer.Argument(metavar="fedml_config.yaml", help="UnitedLLM's file.")],
    run_out: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="RUN.yaml", help="Write the run here.")
    ] = None,
    peer_out: Annotated[
        Path | None, typer.Option(metavar="PEER.yaml", help="Write a trainer's own settings here.")
    ] = None,
) -> None:
    """Translate a configuration of FedML's UnitedLLM, and say what became of each key.

    Mapped: it lives on. Ignored: nothing is lost without it. Refused: the run will not do it.
    The run is named after its file.

    Example: p2pllm config import-unitedllm fedml_config.yaml -o my-run.yaml --peer-out peer.yaml
    """
    from rich.console import Console

    from p2pllm.config.load import load_peer, load_run
    from p2pllm.config.unitedllm import read_unitedllm, translate

    translation = translate(read_unitedllm(file))
    Console().print(_verdict_table(translation))
    counts = Counter(verdict.fate for verdict in translation.verdicts)
    typer.echo(", ".join(f"{counts[f]} {f}" for f in ("mapped", "ignored", "refused", "unknown")))
    for path, values in ((run_out, translation.run), (peer_out, translation.peer)):
        if path is not None:
            _write(path, _as_yaml(file, values, translation))
    if run_out is not None:
        load_run(run_out)
        typer.echo(f"Found the run with: p2pllm bootstrap {run_out}")
    if peer_out is not None:
        load_peer(peer_out)
        typer.echo(f"Train with: p2pllm join --config {peer_out} --initial-peers ADDR")


def _verdict_table(translation: "Translation") -> "Table":
    from rich.table import Table

    from p2pllm.ui import safe

    colors = {"mapped": "green", "ignored": "dim", "refused": "red", "unknown": "yellow"}
    table = Table(show_lines=False)
    for column in ("UnitedLLM", "verdict", "here", "why"):
        table.add_column(column, overflow="fold")
    for verdict in translation.verdicts:
        origin = "" if verdict.in_file else " [dim](its default)[/]"
        table.add_row(
            f"{safe(verdict.key)}: {safe(verdict.shown_value)}{origin}",
            f"[{colors[verdict.fate]}]{verdict.fate}[/]",
            safe(", ".join(_targets(verdict))),
            safe(verdict.outcome.reason),
        )
    return table


def _targets(verdict: "Verdict") -> list[str]:
    """Where the key lives on, as text."""
    from p2pllm.config.text import line_of
    from p2pllm.config.unitedllm_rules import Mapped

    if not isinstance(verdict.outcome, Mapped):
        return []
    run = [line_of(key, value) for key, value in verdict.outcome.run.items()]
    return run + [f"peer: {line_of(key, value)}" for key, value in verdict.outcome.peer.items()]


def _as_yaml(origin: Path, values: dict[str, Any], translation: "Translation") -> str:
    from p2pllm.config.text import line_of

    lost = [v for v in translation.verdicts if v.fate in ("refused", "unknown")]
    lines = [
        f"# Translated from UnitedLLM's {origin.name}.",
        *(f"# {v.fate}: {v.key}: {' '.join(v.outcome.reason.split())}" for v in lost),
        *(line_of(key, value) for key, value in values.items()),
    ]
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    from p2pllm.errors import ConfigExists, OutputUnwritable

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            file.write(text)
    except FileExistsError as problem:
        raise ConfigExists(path=path) from problem
    except OSError as problem:
        raise OutputUnwritable(folder=path.parent, reason=problem.strerror) from problem
