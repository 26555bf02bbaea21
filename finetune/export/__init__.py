"""`finetune export`: a run's result in formats that other tools read."""

from __future__ import annotations

from collections.abc import Sequence

from finetune import UserError
from finetune.export.arguments import (
    add_source_arguments,
    add_weights_arguments,
    require_path,
    torch_dtype,
)
from finetune.terminal import Parser, quiet_libraries

FORMATS = ("diffusers", "lora", "kohya", "single-file")
_FILES = ("kohya", "single-file")  # the others are folders
_ADAPTERS = ("lora", "kohya")

_EXAMPLES = """examples:
  finetune export runs/first --format diffusers --out models/first
  finetune export runs/first --format diffusers --dtype float16 --checkpoint 2000 --out models/first-2000
  finetune export runs/first --format diffusers --ema 0.13 --out models/first-0.13
  finetune export runs/style --format lora --out loras/style
  finetune export runs/style --format kohya --out loras/style.safetensors
  finetune export runs/first --format single-file --dtype float16 --out models/first.safetensors

  diffusers   a folder for DiffusionPipeline.from_pretrained; an adapter is merged into the weights
  lora        a folder for load_lora_weights, from a run with adapter=lora
  kohya       one .safetensors with the adapter as kohya's scripts name it, for WebUI and ComfyUI
  single-file one .safetensors with the keys of the first Stable Diffusion files, which most tools open
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Export a run.

    Raises:
        UserError: a mistake in the arguments, or a run that cannot be exported so.
    """
    parser = Parser(prog="finetune export", description="Write a run's result for other tools.", epilog=_EXAMPLES)
    add_source_arguments(
        parser, "RUN", "a run's folder (for diffusers and single-file also a model: folder, hub id or file)"
    )
    parser.add_argument("--format", required=True, metavar="|".join(FORMATS), help="what to write")
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR|FILE",
        help="a folder that is new or empty; for kohya and single-file a file",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    add_weights_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.format not in FORMATS:
        raise UserError(f"--format {arguments.format}: unknown; choose {' or '.join(FORMATS)}")

    require_path("--out", arguments.out)
    if arguments.format in _ADAPTERS and (arguments.tokenizer or arguments.revision):
        option = "--tokenizer" if arguments.tokenizer else "--revision"
        raise UserError(f"{option} has no effect on --format {arguments.format}, an adapter alone: leave it out")

    quiet_libraries()
    from finetune.export.folder import check_file, check_out
    from finetune.export.lora import export_kohya, export_lora
    from finetune.export.pipeline import export_pipeline
    from finetune.export.single_file import export_single_file

    if arguments.format in _FILES:
        out = check_file(arguments.out, overwrite=arguments.overwrite)
    else:
        out = check_out(arguments.out, arguments.source, overwrite=arguments.overwrite)
    chosen = {
        "weights": arguments.weights,
        "step": arguments.checkpoint,
        "dtype": torch_dtype(arguments.dtype),
    }
    model = {"revision": arguments.revision, "tokenizer": arguments.tokenizer}
    if arguments.format == "lora":
        notices = export_lora(arguments.source, out, **chosen)
    elif arguments.format == "kohya":
        notices = export_kohya(arguments.source, out, **chosen)
    elif arguments.format == "single-file":
        notices = export_single_file(arguments.source, out, **chosen, **model)
    else:
        notices = export_pipeline(arguments.source, out, **chosen, **model)
    for notice in notices:
        print(f"note: {notice}")
    print(out)
    return 0
