"""Prints what lmms-eval has, a line of JSON; run by the interpreter of its environment."""

import json
import sys
from importlib.metadata import version


def main(include: str | None) -> None:
    """Print its version, the names of its tasks with those in the folder `include`, its models."""
    from lmms_eval.models import list_available_models
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    logger.remove()
    tasks = TaskManager("ERROR", include_path=include).all_tasks
    told = {"version": version("lmms_eval"), "tasks": tasks, "models": list_available_models()}
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
