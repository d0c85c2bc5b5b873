__version__ = "0.1.0"

from importlib import import_module as _import_module

_HOMES = {  # public name -> the module it lives in; sdpo_nb/__init__.pyi tells type checkers the same
    "Task": "core.records",
    "Rollout": "core.records",
    "Feedback": "core.records",
    "TeacherView": "core.records",
    "StepReport": "core.records",
    "load_demo": "core.demo",
    "Objective": "loss.objectives",
    "distillation_loss": "loss.objectives",
    "SDPO": "learn.methods",
    "GRPO": "learn.methods",
    "fit": "learn.loop",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for, so that `import sdpo_nb` costs nothing."""
    if name not in _HOMES: raise AttributeError(f"module 'sdpo_nb' has no attribute {name!r}")
    return globals().setdefault(name, getattr(_import_module(f"sdpo_nb.{_HOMES[name]}"), name))


def __dir__() -> list[str]:
    """The public names, imported or not yet."""
    return sorted({*globals(), *__all__})
