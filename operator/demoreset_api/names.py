"""Names that more than one process relies on; each is written here once."""

API_VERSION = "demoreset.dev/v1alpha1"
KIND = "DemoResetRun"
METRICS_PORT = 9400
METRIC_PREFIX = "demoreset_"
COORDINATOR_PORT = 29510
TERMINATION_LOG = "/dev/termination-log"  # where Kubernetes reads a container's last words

# Where a process is told where it is; flags of the same meaning win.
ENV_COORDINATOR = "DEMORESET_COORDINATOR"  # host:port of the run's coordinator
ENV_ADDRESS = "DEMORESET_ADDRESS"  # where other members reach this one: the pod's IP
ENV_ID = "DEMORESET_ID"  # the worker's name; its members are called after it
ENV_CORES = "DEMORESET_CORES"  # cores of one member, where a worker holds several
ENV_WIRE = "DEMORESET_WIRE"  # file descriptor on which a member tells its supervisor
ENV_EVENTS = "DEMORESET_EVENTS"  # file that members append their events to, for measurements
ENV_TERMINATION_LOG = "DEMORESET_TERMINATION_LOG"  # instead of Kubernetes' own place
