from sdpo_nb.core.demo import load_demo as load_demo
from sdpo_nb.core.records import Feedback as Feedback
from sdpo_nb.core.records import Rollout as Rollout
from sdpo_nb.core.records import StepReport as StepReport
from sdpo_nb.core.records import Task as Task
from sdpo_nb.core.records import TeacherView as TeacherView
from sdpo_nb.learn.loop import fit as fit
from sdpo_nb.learn.methods import GRPO as GRPO
from sdpo_nb.learn.methods import SDPO as SDPO
from sdpo_nb.loss.objectives import Objective as Objective
from sdpo_nb.loss.objectives import distillation_loss as distillation_loss

__version__: str
__all__: list[str]
