r"""Copies of run directories, on the head node and in a bucket."""

from .bucket import fetch_records as fetch_records
from .bucket import replicated as replicated
from .client import Connection as Connection
from .client import Disconnected as Disconnected
from .client import RemoteRun as RemoteRun
from .client import find_data as find_data
from .client import local_directory as local_directory
from .client import shares_files as shares_files
from .server import on_node as on_node
from .server import serve_files as serve_files
from .server import stop_scope as stop_scope
from .store import Bucket as Bucket
