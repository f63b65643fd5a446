"""All tasks by name: those of dm_control's suite and those of data/tasks."""

import difflib

from dm_control import suite
from dm_control.rl import control

from data.errors import DataError
from data.tasks import custom

_SAME_BODY = {"pointmass": "point_mass_maze"}  # TD-JEPA's name for ExoRL's maze


def task_names() -> tuple[str, ...]:
    """Returns the names of all tasks: dm_control's suite and those of data/tasks."""
    return tuple(sorted({f"{domain}-{task}" for domain, task in suite.ALL_TASKS} | set(custom.names())))


def body(task: str) -> str:
    """Returns the name of the body that a task moves. Episodes of one task can be relabelled for all tasks of the same
    body."""
    domain = task.split("-")[0]
    return _SAME_BODY.get(domain, domain)


def check_task(task: str) -> None:
    """Raises a DataError that suggests the nearest names when there is no such task."""
    names = task_names()
    if task not in names:
        near = difflib.get_close_matches(task.replace("_", "-", 1) if "-" not in task else task, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(repr(name) for name in near)}?" if near else "see `python -m data.tasks`"
        raise DataError(f"task {task!r} does not exist; {hint} Tasks are named domain-task, such as 'walker-walk'")


def load_task(task: str) -> control.Environment:
    """Returns a new dm_control environment; DataError when there is no such task."""
    check_task(task)
    own = custom.load(task)
    if own is not None:
        return own
    # lqr draws its spring constants when it is loaded. The fixed seed makes it the same task every time.
    return suite.load(*task.split("-", 1), task_kwargs={"random": 0})
