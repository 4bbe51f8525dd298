"""The options that every command taking MODEL DATA shares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hesscli.cli.completion import parameter_names
from hesscli.cli.values import digits, factors, key_values, sample_range
from hesscli.errors import UsageError
from hesscli.job.options import MOST_THREADS, Curvature, DType, Method, ProblemOptions, Reduction

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Force = Annotated[
    bool, typer.Option("--force", "-f", help="Replace a file that hesscli did not write.")
]
Gradient = Annotated[
    bool, typer.Option("--gradient", help="Also write the gradient, as gradient.<parameter>.")
]
Markdown = Annotated[
    bool, typer.Option("--md", help="Print Markdown, for $GITHUB_STEP_SUMMARY say.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]


def written_to(help: str, metavar: str = "FILE") -> Any:
    """The option --output of a command."""
    return typer.Option("--output", "-o", metavar=metavar, help=help)


def problem_options(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="TorchScript, .pt2, a state dict or checkpoint (.pt, .safetensors), or a Hugging Face folder.",
            readable=False,  # said where it is opened
        ),
    ],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="Inputs and targets: .npz, .npy, .safetensors, .pt, .csv, .parquet, .arrow or a datasets folder.",
            readable=False,
        ),
    ],
    loss: Annotated[
        str,
        typer.Option(
            "--loss",
            "-l",
            metavar="NAME",
            help="auto (integer targets: cross-entropy, float targets: mse), mse, cross-entropy, "
            "nll, bce-with-logits, bce, huber, smooth-l1, l1, poisson-nll, kl-div, output (the "
            "model returns its loss), PKG.MOD:FN or FILE.py:FN.",
        ),
    ] = "auto",
    loss_arg: Annotated[
        list[str],
        typer.Option(
            metavar="K=V",
            help="Keyword argument of the loss; V = @KEY takes an array of the data file. "
            "Repeatable.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    reduction: Annotated[Reduction, typer.Option(help="Mean over the data, or sum.")] = "mean",
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            "-a",
            metavar="FACTORY",
            help="For files that hold weights only: PKG.MOD:FACTORY, FILE.py:FACTORY, "
            "transformers:CLASS, timm:NAME or mlp.",
        ),
    ] = None,
    arch_arg: Annotated[
        list[str],
        typer.Option(metavar="K=V", help="Keyword argument of the factory. Repeatable."),
    ] = [],  # noqa: B006
    inputs: Annotated[
        list[str],
        typer.Option(metavar="KEY", help="Array that goes into the model. Repeatable, in order."),
    ] = [],  # noqa: B006
    targets: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Array, column or .npy file that the loss compares with."),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(metavar="N|A:B", help="Only the first N samples, or those from A up to B."),
    ] = None,
    scale: Annotated[
        list[str],
        typer.Option(
            metavar="FACTOR",
            help="Multiply the inputs, as in 1/255 for images of integers; or KEY=FACTOR for one "
            "of several. Repeatable.",
        ),
    ] = [],  # noqa: B006
    output_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="Which entry of the dict or tuple that the model returns to use."
        ),
    ] = None,
    unbatched: Annotated[
        bool,
        typer.Option("--unbatched", help="The arrays have no sample axis: pass them whole."),
    ] = False,
    params: Annotated[
        list[str],
        typer.Option(
            "--params",
            "-p",
            metavar="GLOB",
            autocompletion=parameter_names,
            help="Only the parameters whose names match; a leading ! excludes. Repeatable.",
        ),
    ] = [],  # noqa: B006
    device: Annotated[
        str, typer.Option("--device", "-d", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")
    ] = "auto",
    dtype: Annotated[
        DType, typer.Option(help="auto is the model's own. float64 costs about twice the time.")
    ] = "auto",
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="auto|N", help="Samples that go through at once; the result is the same."
        ),
    ] = "auto",
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", help="Of all random vectors: the check's, and those of estimates."
        ),
    ] = 0,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=MOST_THREADS, help="CPU threads.", show_default="all"),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Load pickled Python objects. They can run any code: only for files you trust.",
        ),
    ] = False,
    train_mode: Annotated[
        bool, typer.Option("--train-mode", help="Leave the model in train mode, as one batch.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            help="Compare with differences of gradients before writing: two gradients per block."
        ),
    ] = True,
    method: Annotated[
        Method,
        typer.Option(
            help="auto takes the fastest that is exact; others are forced. Products have hvp and "
            "finite-difference alone."
        ),
    ] = "auto",
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Let CUDA multiply in TF32: faster, three digits.")
    ] = False,
    curvature: Annotated[
        Curvature,
        typer.Option(
            help="hessian. ggn: generalised Gauss-Newton, J^T H_loss J. fisher: empirical Fisher, "
            "per-sample gradients times themselves."
        ),
    ] = "hessian",
) -> None:
    """The shared options: the parameters that they are on the command line."""


def hessian_or_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="HESSIAN|-|MODEL",
            help="A Hessian file or index (- is standard input), or, with DATA, a model.",
        ),
    ] = "hessian.safetensors",
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="With MODEL: inputs and targets.",
            show_default=False,
            readable=False,
        ),
    ] = None,
) -> None:
    """What stands for MODEL DATA on the command line where a Hessian file will do too."""


def problem_of(arguments: dict[str, Any]) -> ProblemOptions:
    """The options of a problem, from what the command line says."""
    batch_size, samples = arguments["batch_size"], arguments["samples"]
    if batch_size != "auto" and not digits(batch_size):
        raise typer.BadParameter(
            f"{batch_size!r} is not auto or a number", param_hint="--batch-size"
        )
    read = {
        "model": Path(arguments["model"]),
        "loss_arguments": key_values(arguments.pop("loss_arg"), "--loss-arg"),
        "arch_arguments": key_values(arguments.pop("arch_arg"), "--arch-arg"),
        "samples": None if samples is None else sample_range(samples),
        "scale": factors(arguments["scale"]),
        "batch_size": digits(batch_size),
    }
    try:
        return ProblemOptions(**(arguments | read))
    except UsageError as error:
        raise typer.BadParameter(error.message) from None


def refuse_idle_force(force: bool, hint: str, *outputs: Path | None) -> None:
    """Refuses --force where no file is written; the hint is the option that writes one."""
    if force and not any(outputs):
        raise UsageError("--force replaces a file, and none is written", hint)
