from sdpo_nb.core.records import Task as Task, Rollout as Rollout, Feedback as Feedback, TeacherView as TeacherView, StepReport as StepReport
from sdpo_nb.core.models import load_model as load_model
from sdpo_nb.core.adapters import add_adapter as add_adapter, merge_adapter as merge_adapter
from sdpo_nb.core.demo import Codebook as Codebook, load_demo as load_demo
from sdpo_nb.experience.rollouts import Sampling as Sampling, sampler_for as sampler_for
from sdpo_nb.experience.feedback import Environment as Environment, judge_all as judge_all
from sdpo_nb.experience.rewards import Rewards as Rewards
from sdpo_nb.experience.sandbox import run_code as run_code
from sdpo_nb.experience.environments import (
    Demonstrations as Demonstrations,
    ExactMatch as ExactMatch,
    HumanFeedback as HumanFeedback,
    TaskSet as TaskSet,
)
from sdpo_nb.experience.choices import MultipleChoice as MultipleChoice
from sdpo_nb.experience.maths import Maths as Maths, Numbers as Numbers
from sdpo_nb.experience.formats import JSONAnswer as JSONAnswer
from sdpo_nb.experience.toolcalls import ToolCalls as ToolCalls
from sdpo_nb.experience.coding import CodeTests as CodeTests
from sdpo_nb.experience.judging import LLMJudge as LLMJudge
from sdpo_nb.experience.prompting import Prompting as Prompting, teacher_views as teacher_views
from sdpo_nb.experience.successes import SuccessBuffer as SuccessBuffer
from sdpo_nb.experience.fitting import Fitting as Fitting, fit_views as fit_views, measure as measure
from sdpo_nb.loss.objectives import Objective as Objective
from sdpo_nb.loss.distillation import distillation_loss as distillation_loss
from sdpo_nb.loss.fused import Head as Head, fused_distillation_loss as fused_distillation_loss
from sdpo_nb.learn.selves import Keeping as Keeping
from sdpo_nb.learn.teachers import EMA as EMA, Frozen as Frozen, Live as Live, Restart as Restart, TrustRegion as TrustRegion
from sdpo_nb.learn.methods import SDPO as SDPO, GRPO as GRPO
from sdpo_nb.learn.loop import LoopConfig as LoopConfig, fit as fit, pass_rate as pass_rate
from sdpo_nb.learn.config import SDPOConfig as SDPOConfig
from sdpo_nb.learn.presets import (
    colab_t4 as colab_t4,
    paper_rich_feedback as paper_rich_feedback,
    paper_scalar as paper_scalar,
    paper_test_time as paper_test_time,
    small_model as small_model,
)
from sdpo_nb.learn.hosting import as_reward as as_reward, as_rows as as_rows
from sdpo_nb.learn.trainer import SDPOTrainer as SDPOTrainer
from sdpo_nb.learn.testtime import (
    Search as Search,
    SearchConfig as SearchConfig,
    ServerSampler as ServerSampler,
    best_of as best_of,
    discovery as discovery,
    multi_turn as multi_turn,
    refine as refine,
    solve as solve,
)
from sdpo_nb.learn.watching import reports_of as reports_of
from sdpo_nb.view.plots import learning_curves as learning_curves
from sdpo_nb.view.report import write_report as write_report
from sdpo_nb.view.widgets import (
    CompareLens as CompareLens,
    RolloutBrowser as RolloutBrowser,
    TokenLens as TokenLens,
    TrainingMonitor as TrainingMonitor,
)
from sdpo_nb.run.live import WidgetCallback as WidgetCallback

__version__: str
__all__: list[str]
