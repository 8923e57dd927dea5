r"""Ray: nodes, and the trials on them."""

from .clusterfile import check_cluster as check_cluster
from .connect import RayGone as RayGone
from .connect import check_ray_init as check_ray_init
from .connect import connected as connected
from .connect import live_nodes as live_nodes
from .connect import map_on_ray as map_on_ray
from .connect import ray_endpoint as ray_endpoint
from .executor import execute as execute
from .join import announced as announced
from .join import is_requeued as is_requeued
from .join import join_sweep as join_sweep
from .nodes import Facts as Facts
from .nodes import bandwidth as bandwidth
from .nodes import clock_skew as clock_skew
from .nodes import cluster_status as cluster_status
from .nodes import examine as examine
from .nodes import marker as marker
from .nodes import memory_limit as memory_limit
from .nodes import survey as survey
from .ray_node import local_cpus as local_cpus
from .ray_node import local_gpus as local_gpus
from .slots import Slots as Slots
from .slots import fitting as fitting
from .slurm import job_script as job_script
from .slurm import names as names
