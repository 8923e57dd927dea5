r"""One sweep, from its definition to a finished study."""

from .code import OtherCode as OtherCode
from .code import check_code as check_code
from .code import execute as execute
from .code import recorded_code as recorded_code
from .definition import Sweep as Sweep
from .definition import hand_over as hand_over
from .definition import load_script as load_script
from .definition import look_beside as look_beside
from .launch import LaunchRequests as LaunchRequests
from .launch import launch_sweep as launch_sweep
from .preflight import check_start as check_start
from .preflight import find_faults as find_faults
from .preflight import free_disk as free_disk
from .preflight import wandb_faults as wandb_faults
from .preflight import wandb_server as wandb_server
from .prior_runs import adopt as adopt
from .prior_runs import fork as fork
from .record import Options as Options
from .record import compare as compare
from .record import load_record as load_record
from .record import read_sweep as read_sweep
from .requests import NotRunning as NotRunning
from .requests import ask_all as ask_all
from .requests import stop_sweep as stop_sweep
from .requests import watch as watch
from .retention import parse_size as parse_size
