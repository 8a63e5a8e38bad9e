"""The verbs that train, or tell what training would do: run and doctor."""

import argparse
import os
from typing import Any

from aimv2_mllm.errors import UsageError
from aimv2_mllm.narration import note
from aimv2_mllm.verbs.telling import end_with, program


def run(args: argparse.Namespace) -> None:
    """Run a recipe and print where its report is and what can be done with the result."""
    import shlex

    from aimv2_mllm.recipe.file import load_recipe

    try:
        recipe = load_recipe(args.recipe, args.overrides)
    except UsageError:
        # Of the processes that a launcher started here, one tells what all of them find.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(2) from None
        raise
    asked = {key: getattr(args, key) for key in ("accelerator", "devices", "utilisation")}
    if args.dry_run:
        _dry_run(recipe, **asked)
        return
    if given := [key for key, value in asked.items() if value is not None]:
        raise UsageError("\n".join(f"--{key} only works with --dry-run" for key in given))
    # After the recipe is known to be right: it takes seconds.
    from aimv2_mllm.folders import TALKING
    from aimv2_mllm.runs.run import run as run_stages

    folder = run_stages(recipe, note)
    if folder is None:
        return
    report = folder / "report.md"
    print(f"report: {report}" if report.is_file() else f"result: {folder}")
    if any(stage.kind in TALKING for stage in recipe.stages.values()):
        model, picture, lead = shlex.quote(str(folder)), "PICTURE", "next:   "
        if {one.kind for stage in recipe.stages.values() for one in stage.data.sources} == {
            "handwriting"
        }:
            picture = shlex.quote(str(folder / "sheet.png"))
            print(f"{lead}{program()} sample {model} {picture}")
            lead = " " * len(lead)
        print(f"{lead}{program()} chat {model} --image {picture}")


def _dry_run(
    recipe: Any, accelerator: str | None, devices: int | None, utilisation: int | None
) -> None:
    """Print the plan, and end with the problems if there are any."""
    from aimv2_mllm.engine.accelerators import accelerator as known
    from aimv2_mllm.model.hub import stay_offline_unless_reached

    stay_offline_unless_reached()
    from aimv2_mllm.planning.plan import plan
    from aimv2_mllm.planning.text import limits, written

    device, num_devices = known(accelerator), devices or 1
    planned = plan(recipe, device, num_devices)
    print(written(planned, device, num_devices, (utilisation or 40) / 100))
    end_with([*planned.problems, *limits(recipe, planned, device, num_devices)])


def doctor(args: argparse.Namespace) -> None:
    """Print what is sound of a recipe that is to be run, and end with the problems if any."""
    from aimv2_mllm.recipe.file import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    from aimv2_mllm.model.hub import stay_offline_unless_reached

    stay_offline_unless_reached()
    from aimv2_mllm.planning.doctor import examine

    end_with(examine(recipe, print))
