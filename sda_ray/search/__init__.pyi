r"""What to try next, and the study that remembers it."""

from .promotion import FINAL as FINAL
from .promotion import Action as Action
from .promotion import PruneRule as PruneRule
from .promotion import Rules as Rules
from .promotion import TrialRecord as TrialRecord
from .promotion import count_trials as count_trials
from .promotion import decide as decide
from .promotion import rank_key as rank_key
from .promotion import unhide as unhide
from .pruners import hyperband_brackets as hyperband_brackets
from .pruners import prune_rule as prune_rule
from .reconcile import catch_up as catch_up
from .reconcile import mark_run as mark_run
from .sampler import CallbackTrial as CallbackTrial
from .sampler import check_kinds as check_kinds
from .sampler import distributions as distributions
from .sampler import draw_summary as draw_summary
from .sampler import importances as importances
from .sampler import method_text as method_text
from .sampler import propose as propose
from .sampler import quiet_optuna as quiet_optuna
from .sampler import sample as sample
from .study import Propose as Propose
from .study import Study as Study
from .study import draw_run as draw_run
