r"""What a sweep will take, and whether a machine is fit for it."""

from .doctor import Finding as Finding
from .doctor import diagnose as diagnose
from .plan import estimate as estimate
from .plan import expect as expect
from .plan import plan_sweep as plan_sweep
from .plan import plan_to_json as plan_to_json
from .plan import print_plan as print_plan
