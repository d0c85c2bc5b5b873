__version__ = "0.1.0"

from importlib import import_module as _import_module
from sys import modules as _modules
from warnings import warn as _warn

_HOMES = {  # public name -> the module it lives in; sdpo_nb/__init__.pyi tells type checkers the same
    "Task": "core.records",
    "Rollout": "core.records",
    "Feedback": "core.records",
    "TeacherView": "core.records",
    "StepReport": "core.records",
    "load_model": "core.models",
    "add_adapter": "core.adapters",
    "merge_adapter": "core.adapters",
    "Codebook": "core.demo",
    "load_demo": "core.demo",
    "Sampling": "experience.rollouts",
    "sampler_for": "experience.rollouts",
    "Environment": "experience.feedback",
    "judge_all": "experience.feedback",
    "Rewards": "experience.rewards",
    "run_code": "experience.sandbox",
    "TaskSet": "experience.environments",
    "ExactMatch": "experience.environments",
    "MultipleChoice": "experience.choices",
    "HumanFeedback": "experience.environments",
    "Demonstrations": "experience.environments",
    "Numbers": "experience.maths",
    "Maths": "experience.maths",
    "JSONAnswer": "experience.formats",
    "ToolCalls": "experience.toolcalls",
    "CodeTests": "experience.coding",
    "LLMJudge": "experience.judging",
    "Prompting": "experience.prompting",
    "SuccessBuffer": "experience.successes",
    "teacher_views": "experience.prompting",
    "Fitting": "experience.fitting",
    "fit_views": "experience.fitting",
    "measure": "experience.fitting",
    "Objective": "loss.objectives",
    "Head": "loss.fused",
    "distillation_loss": "loss.distillation",
    "fused_distillation_loss": "loss.fused",
    "Keeping": "learn.selves",
    "EMA": "learn.teachers",
    "Frozen": "learn.teachers",
    "Live": "learn.teachers",
    "TrustRegion": "learn.teachers",
    "Restart": "learn.teachers",
    "SDPO": "learn.methods",
    "GRPO": "learn.methods",
    "LoopConfig": "learn.loop",
    "fit": "learn.loop",
    "pass_rate": "learn.loop",
    "SDPOConfig": "learn.config",
    "paper_scalar": "learn.presets",
    "paper_rich_feedback": "learn.presets",
    "paper_test_time": "learn.presets",
    "small_model": "learn.presets",
    "colab_t4": "learn.presets",
    "as_rows": "learn.hosting",
    "as_reward": "learn.hosting",
    "SDPOTrainer": "learn.trainer",
    "Search": "learn.testtime",
    "SearchConfig": "learn.testtime",
    "ServerSampler": "learn.testtime",
    "best_of": "learn.testtime",
    "multi_turn": "learn.testtime",
    "refine": "learn.testtime",
    "solve": "learn.testtime",
    "discovery": "learn.testtime",
    "reports_of": "learn.watching",
    "learning_curves": "view.plots",
    "write_report": "view.report",
    "TokenLens": "view.widgets",
    "TrainingMonitor": "view.widgets",
    "RolloutBrowser": "view.widgets",
    "CompareLens": "view.widgets",
    "WidgetCallback": "run.live",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for, so that `import sdpo_nb` costs nothing."""
    if name not in _HOMES: raise AttributeError(f"module 'sdpo_nb' has no attribute {name!r}")
    if name == "SDPOTrainer" and _came_after("unsloth", "trl"):
        _warn(
            "unsloth was imported after trl, too late for some of what it does; "
            "import unsloth before trl, transformers, peft and sdpo_nb.SDPOTrainer", stacklevel=2,
        )
    return globals().setdefault(name, getattr(_import_module(f"sdpo_nb.{_HOMES[name]}"), name))


def _came_after(late: str, early: str) -> bool:
    """Whether both packages are here, and in this order."""
    names = [name.partition(".")[0] for name in list(_modules)]  # a package stands behind its first parts
    return late in names and early in names[: names.index(late)]


def __dir__() -> list[str]:
    """The public names, imported or not yet."""
    return sorted({*globals(), *__all__})
