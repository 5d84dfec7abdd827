"""The command line: arguments in, calls out. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import gc
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from awqconv._version import __version__
from awqconv.console import Console, dumps, size
from awqconv.errors import AwqconvError

if TYPE_CHECKING:
    from awqconv.plan import Plan, Verdict

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Convert AWQ int4 checkpoints ahead of time into the layout a serving engine's kernel "
    "reads, and prove the result.",
)

Json = Annotated[bool, typer.Option("--json", help="One JSON value on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.")]
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Threads.")]
Token = Annotated[
    str | None, typer.Option("--token", help="Instead of HF_TOKEN or `hf auth login`.")
]
SHOWN = 12  # rows of a list that people read; --json has all


def _version(value: bool) -> None:
    if value:
        typer.echo(f"awqconv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, or hf://REPO[@REV].")],
    target: Annotated[str | None, typer.Option("--target", "-t", help="Check for this.")] = None,
    tp: Annotated[
        list[int] | None,
        typer.Option("--tp", min=1, help="With --target: number of ranks; may be repeated."),
    ] = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Say what a checkpoint is and what a target would make of it. Reads headers only."""
    console = _console(json_mode=json)
    from awqconv.hub import open_source
    from awqconv.inspection import inspect as run

    found = run(open_source(model, token=token), target=target, tp=tp or ())
    console.emit(found)
    group = "channelwise" if found.group_size == -1 else found.group_size
    console.facts(
        [
            ("model", found.path),
            ("layout", "AutoAWQ GEMM" if found.layout == "awq" else found.layout),
            ("weights", f"{found.bits} bits, group size {group}"),
            ("modules", f"{found.quantized} quantized ({size(found.quantized_bytes)})"),
            ("other tensors", found.others),
            ("bytes", f"{size(found.nbytes)} in {found.shards} files"),
        ]
    )
    if found.to_download:
        console.facts([("to download", size(found.to_download))])
    if found.modules_to_not_convert:
        console.facts([("not converted", ", ".join(found.modules_to_not_convert))])
    console.table(
        ("module", ">count", ">K", ">N", ">g", "layout", ">bytes"),
        [(k.name, k.count, k.K, k.N, k.g, k.layout, size(k.nbytes)) for k in found.kinds],
    )
    _notes(console, found.notes)
    if found.verdicts is not None:
        console.say(f"{target} takes {found.taken} of {len(found.verdicts)} modules.")
        _fallbacks(console, [v for v in found.verdicts if v.rule])
    if found.ranks:
        console.table(
            (">ranks", ">bytes of one", ">modules on the fallback", "cannot be shared"),
            [
                (
                    r.tp,
                    size(r.nbytes),
                    len(r.fallbacks),
                    "; ".join(f"{where}: {what}" for where, what in r.refused[:2]),
                )
                for r in found.ranks
            ],
        )
        for rank in found.ranks:
            if rank.fallbacks:
                console.say(f"With {rank.tp} ranks:")
                _fallbacks(console, rank.fallbacks)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, or hf://REPO[@REV].")],
    *,
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="Layouts; may be repeated.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", "-m", min=1, help="Rows M; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write a roofline to this .png or .svg.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure conversion rate and GEMM latency for a model's shapes on this machine."""
    console = _console(json_mode=json)
    from awqconv.bench import bench as run
    from awqconv.targets import layout

    names = tuple(target or ("marlin",))
    for name in names:
        layout(name)
    result = run(model, names, tuple(batch or (1, 16, 64, 256)), device, console.hint)
    console.emit(result.to_dict())
    console.facts(
        [("device", result.device), ("bandwidth", f"{size(result.bandwidth)}/s, measured")]
    )
    console.table(*result.table())
    if plot:
        result.plot(plot)
        console.say(f"Roofline: {plot}")


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, or hf://REPO[@REV].")],
    dest: Annotated[
        Path | None, typer.Argument(help="Folder to write.", show_default="MODEL-TARGET")
    ] = None,
    *,
    target: Annotated[str, typer.Option("--target", "-t", help="See `awqconv targets`.")],
    form: Annotated[
        str, typer.Option("--form", help="hf, or sglang-sharded: files for each rank.")
    ] = "hf",
    tp: Annotated[int, typer.Option("--tp", min=1, help="Ranks of the sharded form.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse modules that would fall back.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier conversion.")
    ] = False,
    jobs: Jobs = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="Resident memory to stay under: 400MB.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Bytes of one file at most.")
    ] = "5GB",
    scale_dtype: Annotated[
        str, typer.Option("--scale-dtype", help="keep, float16, bfloat16 or float32.")
    ] = "keep",
    token: Token = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Convert a checkpoint. `--target awq` turns a converted folder back, byte for byte."""
    console = _console(json_mode=json, quiet=quiet)
    from awqconv.checkpoint.model import open_model
    from awqconv.conversion import check, default_dest, run
    from awqconv.hub import PREFIX, open_source
    from awqconv.plan import make_plan
    from awqconv.serving.launch import launch_command
    from awqconv.targets import layout

    chosen = layout(target)
    opened = open_model(open_source(model, token=token))
    plan = make_plan(
        opened,
        chosen,
        form=form,
        tp=tp,
        scale_dtype=scale_dtype,
        max_shard_size=max_shard_size,
        strict=strict,
    )
    path = dest or default_dest(model, target, form, tp)
    check(plan, path, overwrite=overwrite)
    _show_plan(console, plan, path)
    if dry_run:
        console.emit(_plan_facts(plan, path))
        return
    with (
        _interruptible(console),
        closing(opened.checkpoint.source),
        console.progress("converting", plan.nbytes) as progress,
    ):
        result = run(
            plan, path, overwrite=overwrite, jobs=jobs, max_memory=max_memory, progress=progress
        )
    console.emit(result)
    if result.resumed:
        console.say(f"Continued an interrupted run: {result.resumed} jobs were already done.")
    rate = result.nbytes / result.seconds
    console.say(
        f"Wrote {size(result.nbytes)} in {result.seconds:.1f} s ({size(rate)}/s) to {path}",
        style="green",
    )
    console.say(
        f"{result.converted} modules converted to {target}, {len(result.fallbacks)} on the "
        f"fallback, {result.unquantized} other tensors copied."
    )
    _fallbacks(console, result.fallbacks)
    _notes(console, result.notes[len(plan.notes) :])
    source = [] if model.startswith(PREFIX) else ["--source", model]
    console.say(f"Verify it: {shlex.join(['awqconv', 'verify', str(path), *source])}")
    for engine, command in launch_command(target, str(path), form, tp)[:1]:
        console.say(f"Serve it ({engine}): {command}")


@app.command()
def verify(
    dest: Annotated[Path, typer.Argument(help="Folder that `awqconv convert` wrote.")],
    source: Annotated[
        str | None, typer.Option("--source", help="The AWQ checkpoint it was made from.")
    ] = None,
    modules: Annotated[
        str | None, typer.Option("--modules", help="Only modules this expression finds.")
    ] = None,
    columns: Annotated[
        int, typer.Option("--columns", min=0, help="Output columns to multiply; 0 for none.")
    ] = 64,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of K to sum over.")] = 1024,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    kernel: Annotated[str, typer.Option("--kernel", help="auto, triton or cpu.")] = "auto",
    jobs: Jobs = None,
    token: Token = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write the result as JSON to this file.")
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Prove a conversion: files, bytes, products. Exits 0 if right, 1 if not, 2 if unreadable."""
    console = _console(json_mode=json, quiet=quiet)
    from awqconv.verification import verify as run

    total = sum(f.stat().st_size for f in dest.glob("*.safetensors")) if dest.is_dir() else 0
    with console.progress("verifying", total) as progress:
        found = run(
            dest,
            source=source,
            modules=modules,
            columns=columns,
            rows=rows,
            device=device,
            kernel=kernel,
            jobs=jobs,
            token=token,
            progress=progress,
        )
    value = {"ok": found.ok, **vars(found)}
    console.emit(value)
    if report:
        try:
            report.write_text(dumps(value) + "\n")
        except OSError as error:
            raise AwqconvError(
                f"the report cannot be written: {error.strerror}", str(report), "Name another."
            ) from None
    console.facts(
        [
            ("folder", f"{found.dest} ({found.target})"),
            ("integrity", f"{found.files} files, {found.tensors} tensors, {size(found.nbytes)}"),
            (
                "exactness",
                f"{sum(m.exact for m in found.modules)} of {len(found.modules)} modules against "
                + (found.source or "the manifest's digests"),
            ),
        ]
    )
    if found.sampled:
        console.facts([("product", found.sampled)])
    if nearest := found.nearest:
        console.facts(
            [
                (
                    "nearest",
                    f"{nearest.module}: error {nearest.error:.2e}, bound {nearest.bound:.2e}",
                )
            ]
        )
    _notes(console, found.notes)
    for problem in found.problems[:SHOWN]:
        console.say(f"  {problem}", style="red")
    if len(found.problems) > SHOWN:
        console.say(f"  and {len(found.problems) - SHOWN} more (--json has all)", style="red")
    if not found.ok:
        console.say(f"FAILED: {len(found.problems)} problems", style="bold red")
        raise typer.Exit(1)
    console.say(f"OK in {found.seconds:.1f} s", style="green")


@app.command()
def targets(json: Json = False) -> None:
    """List the targets and the rules their kernels set."""
    console = _console(json_mode=json)
    from awqconv.targets import targets as known

    console.emit(
        [
            {
                "name": t.name,
                "title": t.title,
                "layout_version": t.version,
                "fallback": t.fallback,
                "rules": [{"rule": r.text, "source": r.source} for r in t.rules],
            }
            for t in known()
        ]
    )
    console.table(
        ("target", "read by", "takes", "fallback"),
        [(t.name, t.title, ", ".join(r.text for r in t.rules), t.fallback) for t in known()],
    )


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="Repository on the hub: REPO or REPO@REVISION.")],
    *,
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder to download to.", show_default="hub cache")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag, commit.")] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Only these globs.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="Not these globs.")] = None,
    token: Token = None,
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", help="Another hub cache than HF_HOME's.")
    ] = None,
    max_workers: Annotated[int, typer.Option("--max-workers", min=1, help="Files at a time.")] = 8,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and stop.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Download what is here too, into any folder.")
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Download an AWQ model from the Hugging Face Hub and check every file against its record."""
    console = _console(json_mode=json, quiet=quiet)
    from awqconv.hub.pull import prepare

    prepared = prepare(
        repo,
        revision=revision,
        to=to,
        include=include or (),
        exclude=exclude or (),
        token=token,
        cache_dir=cache_dir,
        force=force,
    )
    plan = prepared.plan
    console.facts(
        [
            ("from", f"{plan.repo} at {plan.commit}"),
            ("to", plan.path),
            ("files", f"{len(plan.files)} ({size(plan.nbytes)}), {len(plan.left_out)} left out"),
            ("to download", size(plan.to_download)),
        ]
    )
    if dry_run:
        console.table(
            (">bytes", "file", "here"),
            [(size(f.size), f.name, "yes" if f.cached else "") for f in plan.files],
        )
        console.emit(plan.as_json())
        return
    shown = console.progress("downloading", plan.nbytes) if prepared.bars else nullcontext()
    with _interruptible(console), shown as progress:
        result = prepared.run(max_workers, progress)
    console.emit(result.as_json())
    for file in result.files:
        if file.refetched:
            console.say(f"note: {file.name} was corrupt and was fetched again", style="yellow")
    unknown = sum(file.digest is None for file in result.files)
    console.say(
        f"{len(result.files) - unknown} files are what the hub records"
        + (f", {unknown} have no record here" if unknown else "")
        + f": {result.path}",
        style="green",
    )
    console.say(f"Convert it: {shlex.join(['awqconv', 'convert', str(result.path)])} -t TARGET")


@app.command()
def push(
    dest: Annotated[Path, typer.Argument(help="Folder that `awqconv convert` wrote.")],
    repo: Annotated[str, typer.Argument(help="Repository on the hub, made if need be.")],
    *,
    private: Annotated[bool, typer.Option("--private", help="Make it a private one.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Repository of the AWQ checkpoint.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option("--card", help="README.md to upload, instead of one made here.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    token: Token = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Verify a conversion and upload it to the Hugging Face Hub, with a model card."""
    console = _console(json_mode=json, quiet=quiet)
    from awqconv.hub.push import push as run

    total = sum(f.stat().st_size for f in dest.glob("*.safetensors")) if dest.is_dir() else 0
    with _interruptible(console), console.progress("verifying", total) as progress:
        done = run(
            dest,
            repo,
            private=private,
            create_pr=create_pr,
            base_model=base_model,
            card=card,
            message=message,
            token=token,
            progress=progress,
        )
    console.emit(done)
    if done.card == "kept":
        console.say("note: its README.md was edited by people and is left alone", style="yellow")
    if not done.base_model:
        console.say("note: the card names no base model; give --base-model", style="yellow")
    console.say(f"{done.files} files ({size(done.nbytes)}) are at {done.url}", style="green")


@contextmanager
def _interruptible(console: Console) -> Iterator[None]:
    """Ctrl-C says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["awqconv", *sys.argv[1:]])
        console.hint(f"\nInterrupted; what is done is kept. To continue: {again}")
        raise typer.Exit(130) from None


def _notes(console: Console, notes: list[str]) -> None:
    for note in notes:
        console.say(f"note: {note}", style="yellow")


def _fallbacks(console: Console, fallbacks: list[Verdict]) -> None:
    """Modules on the fallback, gathered by rule."""
    counts = Counter((v.rule, v.layout) for v in fallbacks)
    for (rule, layout), count in list(counts.items())[:SHOWN]:
        first = next(v.module for v in fallbacks if v.rule == rule)
        console.say(f"  {count} stay {layout}: they break {rule}, first {first}", style="yellow")
    if len(counts) > SHOWN:
        console.say(f"  and {len(counts) - SHOWN} more rules (--json has all)", style="yellow")


def _plan_facts(plan: Plan, dest: Path) -> dict[str, Any]:
    return {
        "source": plan.model.checkpoint.source.name,
        "dest": str(dest),
        "target": plan.target.name,
        "form": plan.form,
        "tp": plan.tp,
        "nbytes": plan.nbytes,
        "files": [{"name": f.name, "size": f.size} for f in plan.files],
        "copies": list(plan.copies),
        "modules": list(plan.verdicts),
        "notes": plan.notes,
    }


def _show_plan(console: Console, plan: Plan, dest: Path) -> None:
    model = plan.model
    taken = len(plan.verdicts) - len(plan.fallbacks)
    console.facts(
        [
            ("from", f"{model.checkpoint.source.name} ({model.layout})"),
            ("to", f"{dest} ({plan.target.name}: {plan.target.title})"),
            ("modules", f"{taken} of {len(plan.verdicts)} to {plan.target.name}"),
            (
                "writes",
                f"{size(plan.nbytes)} in {len(plan.files)} files, {len(plan.copies)} copied",
            ),
        ]
    )
    _fallbacks(console, plan.fallbacks)
    _notes(console, plan.notes)


_active = Console()


def _console(*, json_mode: bool = False, quiet: bool = False) -> Console:
    """The console of this run, remembered for errors."""
    global _active  # noqa: PLW0603
    _active = Console(json_mode=json_mode, quiet=quiet)
    return _active


def main() -> NoReturn:
    """Run the command line. Exits 0: done, 1: verification failed, 2: bad input, 130: stopped."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own threads would only spin
    try:
        app()
    except AwqconvError as error:
        _active.error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    gc.freeze()  # or the interpreter looks for cycles in all there is before it ends
    sys.exit(0)
